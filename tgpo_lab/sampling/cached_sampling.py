"""Sampling responses with a key-value cache, finished rows dropped from the batch.

Random numbers are drawn beforehand, one for each row and position. So what a row samples depends on
the seed and on nothing else: not on which other rows are still running, not on the batch size. What is computed of a
row does differ by rounding with the rows beside it, and with how far its prompt is padded; where that carries a random
number over the edge of a token, another token is drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..models.policy import SEARCH_BLOCK, most_probable, project_to_vocabulary
from ..parallel.placement import device_of
from ..rollouts import Rollouts, join_rollouts
from .decoding import next_hidden, preallocated_cache
from .fixed_shape_decoding import FixedShapeDecoder

# Finished rows leave the batch once they are this share of it: leaving costs a copy of the cache.
DROP_SHARE = 0.2
# Tokens between looks at which rows have finished. A GPU is waited for at each; a CPU has nothing to wait for.
LOOK_EVERY = {"cuda": 16}


def draw_tokens(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token per row by inverting the cumulative distribution: (B, V) logits, (B,) in [0, 1) → (B,) int64.

    One number per row instead of one per logit: far cheaper than ``torch.multinomial``. The
    vocabulary is searched in two steps, the block first, so only one block is summed up per row.
    """
    return draw_with_probabilities(logits, uniform)[0]


def draw_with_probabilities(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`draw_tokens`, and the probabilities of what was drawn: (B,) int64 and (B,)."""
    batch, vocabulary = logits.shape
    probabilities = logits.softmax(-1)
    if vocabulary % SEARCH_BLOCK:
        probabilities = torch.nn.functional.pad(probabilities, (0, -vocabulary % SEARCH_BLOCK))
    blocks = probabilities.view(batch, -1, SEARCH_BLOCK)
    cumulative = blocks.sum(-1).cumsum(-1)  # (B, blocks)
    target = uniform.to(cumulative).unsqueeze(-1) * cumulative[:, -1:]  # (B, 1)
    chosen = _first_above(cumulative, target)  # (B, 1)
    inside = blocks.gather(1, chosen.unsqueeze(-1).expand(-1, -1, SEARCH_BLOCK)).squeeze(1)  # (B, block)
    within = inside.cumsum(-1)
    target = target - (cumulative.gather(-1, chosen) - within[:, -1:])
    drawn = chosen * SEARCH_BLOCK + _first_above(within, target)  # (B, 1)
    chance = probabilities.gather(-1, drawn)
    # On a GPU, reading the logits once more costs less than waiting for it at every token to know whether to.
    if logits.is_cuda or not float(chance.min()) > 0:
        # Rounding has carried the target past the block, or a GPU's sums are not quite in order, or logits are not
        # finite, which the loss will say.
        drawn = torch.where(chance > 0, drawn, most_probable(logits).unsqueeze(-1))
        chance = probabilities.gather(-1, drawn)
    return drawn.squeeze(-1), chance.squeeze(-1)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Where a row of cumulative weights (B, N) first exceeds its target (B, 1), or the last place; (B, 1) int64."""
    return torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[-1] - 1)


def prompts_at_once(prompts: int, samples_per_prompt: int, rows_at_once: int) -> int:
    """How many of ``prompts`` are answered at once: as many as make ``rows_at_once`` rows, at least one; all for 0."""
    return min(prompts, max(1, rows_at_once // samples_per_prompt)) if rows_at_once else prompts


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
    uniform: Tensor | None = None,
    vocabulary_size: int | None = None,
    first: int = 0,
    of: int | None = None,
    decoder: FixedShapeDecoder | None = None,
    rows_at_once: int = 0,
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
        generator: CPU generator for the random numbers; needed unless greedy, or
        uniform: (rows, max_new_tokens) those numbers themselves, in [0, 1).
        vocabulary_size: tokens from this id on are never written (padded vocabulary rows).
        first, of: these prompts are part of ``of``, the first of them standing at ``first``. They get the random
            numbers that they would get among all of them.
        decoder: of this model; reads tokens with tensors of fixed shape, and drops no finished rows.
        rows_at_once: at most so many responses are written at once, whole groups of a prompt, at least one; the others
            after them. 0 for all. Random numbers are those of all at once, so responses are, too, but for rounding.

    Returns:
        Rollouts on the model's device, with log-probabilities unless greedy.
    """
    rows = len(prompts) * samples_per_prompt
    if temperature > 0:
        if generator is None and uniform is None:
            raise ValueError("Sampling at a temperature above 0 needs a generator: what it draws must be repeatable.")
        if uniform is None:
            everyone = (len(prompts) if of is None else of) * samples_per_prompt
            uniform = torch.rand(everyone, max_new_tokens, generator=generator)
            uniform = uniform[first * samples_per_prompt :][:rows]
        uniform = uniform.to(device_of(model))
    step = prompts_at_once(len(prompts), samples_per_prompt, rows_at_once)
    parts = []
    for start in range(0, len(prompts), step):
        own = slice(start * samples_per_prompt, (start + step) * samples_per_prompt)
        parts.append(
            _sample_at_once(
                model, prompts[start : start + step], max_new_tokens, end_tokens, pad_token, samples_per_prompt,
                temperature, None if uniform is None else uniform[own], vocabulary_size, decoder,
            )
        )  # fmt: skip
    return parts[0] if len(parts) == 1 else join_rollouts(parts)


def _sample_at_once(
    model: PreTrainedModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    end_tokens: list[int],
    pad_token: int,
    samples_per_prompt: int,
    temperature: float,
    uniform: Tensor | None,
    vocabulary_size: int | None,
    decoder: FixedShapeDecoder | None,
) -> Rollouts:
    ends = torch.tensor(end_tokens, device=device_of(model))
    # Tensors of inference mode cost less to make. But a decoder keeps its own, for code that was compiled without it;
    # and autocast remembers no weight that it converted in that mode: it would convert each at every token.
    plain = decoder is not None or torch.is_autocast_enabled(ends.device.type)
    with torch.no_grad() if plain else torch.inference_mode():
        responses, probabilities = _write(
            model, prompts, max_new_tokens, ends, pad_token, samples_per_prompt, temperature, uniform,
            vocabulary_size, decoder,
        )  # fmt: skip
    is_end = torch.isin(responses, ends)
    finished_rows = is_end.any(-1)
    # The padding token can be an end token as well; only what stands before the first end counts.
    lengths = torch.where(finished_rows, is_end.int().argmax(-1) + 1, max_new_tokens)
    width = int(lengths.max())
    mask = torch.arange(width, device=ends.device) < lengths.unsqueeze(-1)
    return Rollouts(
        [prompt for prompt in prompts for _ in range(samples_per_prompt)],
        responses[:, :width].where(mask, pad_token),
        mask,
        finished_rows,
        pad_token,
        torch.where(mask, probabilities[:, :width].log(), 0.0) if temperature > 0 else None,
    )


def _write(
    model: PreTrainedModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    ends: Tensor,
    pad_token: int,
    samples_per_prompt: int,
    temperature: float,
    uniform: Tensor | None,
    vocabulary_size: int | None,
    decoder: FixedShapeDecoder | None,
) -> tuple[Tensor, Tensor]:
    """Tokens of all rows, anything after a row's end, and their probabilities unless greedy: (B, most tokens) each."""
    device, rows = ends.device, len(prompts) * samples_per_prompt
    longest = max(len(p) for p in prompts)
    capacity = longest + (max_new_tokens if decoder is None else 0)
    cache = preallocated_cache(model, capacity)

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

    read = next_hidden(model, cache, capacity) if decoder is None else decoder.begin(cache, visible, max_new_tokens)
    look_every = LOOK_EVERY.get(device.type, 1)
    responses = torch.full((rows, max_new_tokens), pad_token, device=device)
    probabilities = torch.ones(rows, max_new_tokens, device=device)
    # Of the rows that are still in the batch: which they are, what they have written, and who of them has ended.
    running, written, drawn_with = torch.arange(rows, device=device), responses.clone(), probabilities.clone()
    done = torch.zeros(rows, dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        logits = project_to_vocabulary(model, hidden, vocabulary_size)
        if temperature > 0:
            logits = logits / temperature if temperature != 1 else logits
            drawn, drawn_with[:, step] = draw_with_probabilities(logits, uniform[:, step])
        else:
            drawn = most_probable(logits)
        written[:, step] = drawn  # after a row's end, too, until it leaves the batch
        done |= drawn == ends if len(ends) == 1 else torch.isin(drawn, ends)
        finished = int(done.sum()) if (step + 1) % look_every == 0 else 0
        if finished == len(running) or step + 1 == max_new_tokens:
            break
        if decoder is None and finished > DROP_SHARE * len(running):
            responses[running], probabilities[running] = written, drawn_with
            keep = (~done).nonzero().squeeze(-1)
            running, written, drawn_with, drawn, positions, visible, done = (
                x[keep] for x in (running, written, drawn_with, drawn, positions, visible, done)
            )
            uniform = None if uniform is None else uniform[keep]
            cache.reorder_cache(keep)
        positions = positions + 1
        if padded:
            visible = torch.nn.functional.pad(visible, (0, 1), value=1)
        hidden = read(drawn, positions, visible if padded else None)
    responses[running], probabilities[running] = written, drawn_with
    return responses, probabilities
