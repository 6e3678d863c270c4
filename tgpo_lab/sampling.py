"""Sampling responses with a key-value cache, finished rows dropped from the batch.

Random numbers are drawn beforehand, one for each row and position. So what a row samples depends on
the seed and on nothing else: not on which other rows are still running, not on the batch size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .policy import project_to_vocabulary
from .rollouts import Rollouts

# Finished rows leave the batch once they are this share of it: leaving costs a copy of the cache.
DROP_SHARE = 0.2


class PreallocatedLayer(DynamicLayer):
    """A cache layer that writes into one buffer and gives out views of the filled part.

    ``DynamicLayer`` copies the whole cache for every token; this one copies the token.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.filled = capacity, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append (B, heads, new, head width) states; return all states so far."""
        start, self.filled = self.filled, self.filled + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._keys, self._values = (self._buffer(states) for states in (key_states, value_states))
        self._keys[:, :, start : self.filled] = key_states
        self._values[:, :, start : self.filled] = value_states
        self.keys, self.values = self._keys[:, :, : self.filled], self._values[:, :, : self.filled]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows ``beam_idx``, in that order, repeats allowed."""
        keys, values = self.keys[beam_idx], self.values[beam_idx]
        self._keys, self._values = self._buffer(keys), self._buffer(values)
        self._keys[:, :, : self.filled], self._values[:, :, : self.filled] = keys, values
        self.keys, self.values = self._keys[:, :, : self.filled], self._values[:, :, : self.filled]

    def _buffer(self, states: Tensor) -> Tensor:
        batch, heads, _, width = states.shape
        return states.new_empty(batch, heads, self.capacity, width)


def draw_tokens(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token per row by inverting the cumulative distribution: (B, V) logits, (B,) in [0, 1) → (B,) int64.

    One number per row instead of one per logit: far cheaper than ``torch.multinomial``. The
    vocabulary is searched in two steps, the block first, so only one block is summed up per row.
    """
    batch, vocabulary = logits.shape
    weights = (logits - logits.amax(-1, keepdim=True)).exp()  # (B, V), not normalised
    block = max(1, round(vocabulary**0.5))
    padding = -vocabulary % block
    blocks = torch.nn.functional.pad(weights, (0, padding)).view(batch, -1, block)
    cumulative = blocks.sum(-1).cumsum(-1)  # (B, blocks)
    target = (uniform.to(cumulative) * cumulative[:, -1]).unsqueeze(-1)  # (B, 1)
    chosen = (cumulative <= target).sum(-1).clamp(max=blocks.shape[1] - 1)  # (B,)
    rows = torch.arange(batch, device=logits.device)
    before = torch.where(chosen > 0, cumulative[rows, (chosen - 1).clamp(min=0)], 0.0)
    within = blocks[rows, chosen].cumsum(-1)  # (B, block)
    position = (within <= target - before.unsqueeze(-1)).sum(-1)
    # Rounding can carry the target past the last token with weight; then that token is meant.
    last = (blocks[rows, chosen] > 0).long().mul(torch.arange(1, block + 1, device=logits.device)).amax(-1) - 1
    return chosen * block + torch.minimum(position, last)


@torch.no_grad()
def sample_responses(
    model: PreTrainedModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    end_tokens: list[int],
    pad_token: int,
    *,
    samples_per_prompt: int = 1,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    vocabulary_size: int | None = None,
) -> Rollouts:
    """Sample responses (or take the most probable token each time, at temperature 0).

    Args:
        model: any Hugging Face causal language model, in evaluation mode.
        prompts: token ids, one list per prompt, none empty.
        max_new_tokens: responses are cut after this many tokens.
        end_tokens: any of these ends a response and belongs to it.
        pad_token: fills the places after the end.
        samples_per_prompt: G; the result has len(prompts) × G rows, groups together.
        temperature: divides the logits; 0 is greedy.
        generator: CPU generator for the random numbers; needed unless greedy.
        vocabulary_size: tokens from this id on are never written (padded vocabulary rows).

    Returns:
        Rollouts on the model's device.
    """
    device, rows = model.device, len(prompts) * samples_per_prompt
    if temperature > 0:
        if generator is None:
            raise ValueError("Sampling at a temperature above 0 needs a generator: what it draws must be repeatable.")
        uniform = torch.rand(rows, max_new_tokens, generator=generator).to(device)
    longest = max(len(p) for p in prompts)
    ends = torch.tensor(end_tokens, device=device)
    cache = _cache(model, longest + max_new_tokens)

    # Prompts are read once each, padded on the left, and only then repeated for their G samples.
    tokens = torch.tensor([[pad_token] * (longest - len(p)) + p for p in prompts], device=device)
    visible = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    padded = not bool(visible.all())
    positions = (visible.cumsum(-1) - 1).clamp(min=0)
    hidden = model.base_model(
        tokens,
        attention_mask=visible if padded else None,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1]
    repeat = torch.arange(len(prompts), device=device).repeat_interleave(samples_per_prompt)
    cache.reorder_cache(repeat)
    hidden, visible, positions = hidden[repeat], visible[repeat], positions[repeat, -1]

    responses = torch.full((rows, max_new_tokens), pad_token, device=device)
    lengths = torch.full((rows,), max_new_tokens, device=device)
    running = torch.arange(rows, device=device)  # the rows still in the batch
    done = torch.zeros(rows, dtype=torch.bool, device=device)  # (len(running),)
    for step in range(max_new_tokens):
        logits = project_to_vocabulary(model, hidden, vocabulary_size)
        if temperature > 0:
            drawn = draw_tokens(logits / temperature if temperature != 1 else logits, uniform[running, step])
        else:
            drawn = logits.argmax(-1)
        responses[running, step] = torch.where(done, pad_token, drawn)
        ended = torch.isin(drawn, ends) & ~done
        lengths[running[ended]] = step + 1
        done = done | ended
        finished = int(done.sum())
        if finished == len(running) or step + 1 == max_new_tokens:
            break
        if finished > DROP_SHARE * len(running):
            keep = (~done).nonzero().squeeze(-1)
            running, drawn, positions, visible, done = (x[keep] for x in (running, drawn, positions, visible, done))
            cache.reorder_cache(keep)
        positions = positions + 1
        if padded:
            visible = torch.nn.functional.pad(visible, (0, 1), value=1)
        hidden = model.base_model(
            drawn.unsqueeze(-1),
            attention_mask=visible if padded else None,
            position_ids=positions.unsqueeze(-1),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]

    width = int(lengths.max())
    mask = torch.arange(width, device=device) < lengths.unsqueeze(-1)
    last = responses.gather(1, lengths.unsqueeze(-1) - 1).squeeze(-1)
    return Rollouts(
        [prompt for prompt in prompts for _ in range(samples_per_prompt)],
        responses[:, :width],
        mask,
        torch.isin(last, ends),
        pad_token,
    )


def _cache(model: PreTrainedModel, capacity: int) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    # Sliding-window and recurrent layers keep the cache that transformers gives them.
    cache.layers = [PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
