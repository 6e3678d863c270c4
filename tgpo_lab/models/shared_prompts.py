"""A known decoder reads responses, and the prompt that several of them answer once for all of them.

Everything but attention treats a token alike wherever it stands. So the tokens of the distinct prompts and of all
responses pass through the layers as one list, and only attention sets a prompt's keys and values before those of each
of its responses. With 8 samples for each prompt that leaves out seven of eight prompts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..rollouts import Rollouts
from .attention import attention
from .known_decoders import is_known_decoder, modules_left_out, read_layer, rms_norm, rotations


def can_share_prompts(model: PreTrainedModel) -> bool:
    """Whether :func:`states_with_shared_prompts` computes what this model's own forward pass does, and sooner.

    Not on a GPU, whose fastest attention takes no mask; not where activations are computed again in the backward pass,
    attention drops some of its weights, or hooks gather sharded weights, which happens in the layers' own forward pass;
    not in float64, in which transformers' norms still compute in float32.
    """
    trunk = model.base_model
    return (
        model.device.type == "cpu"
        and model.dtype != torch.float64
        and is_known_decoder(model)
        and not (torch.is_grad_enabled() and any(layer.gradient_checkpointing for layer in trunk.layers))
        and not (model.training and model.config.attention_dropout)
        and not any(module._forward_hooks or module._forward_pre_hooks for module in modules_left_out(model))
    )


def states_with_shared_prompts(model: PreTrainedModel, rollouts: Rollouts) -> Tensor:
    """Hidden states that predict the response tokens, padding left out: (N, H), in row-major order.

    The last prompt token predicts the first response token, and each response token the next one.

    Args:
        model: one that :func:`can_share_prompts`.
        rollouts: B rows of T response positions.
    """
    trunk, tokens = model.base_model, _Tokens(rollouts)
    cosine, sine = rotations(model, tokens.longest_prompt + tokens.steps)
    cosine, sine = cosine[tokens.positions].unsqueeze(1), sine[tokens.positions].unsqueeze(1)
    hidden = trunk.embed_tokens(tokens.ids)
    for layer in trunk.layers:
        hidden = read_layer(layer, hidden, cosine, sine, tokens.attend)
    return rms_norm(hidden.index_select(0, tokens.predicting), trunk.norm)


class _Tokens:
    """The list: p distinct prompts of P tokens, then B responses of R = T − 1, as the last one is never read."""

    def __init__(self, rollouts: Rollouts):
        device = rollouts.responses.device
        places: dict[tuple[int, ...], int] = {}
        # (B,) which of the distinct prompts stands before each row
        self._prompt_of = torch.tensor([places.setdefault(tuple(p), len(places)) for p in rollouts.prompts]).to(device)
        lengths = torch.tensor([len(prompt) for prompt in places])
        self._prompts, self.longest_prompt = len(places), int(lengths.max())  # p, P
        padded = [[*prompt, *[rollouts.pad_token] * (self.longest_prompt - len(prompt))] for prompt in places]
        read = rollouts.responses[:, :-1]  # (B, R)
        self._rows, self.steps = read.shape
        self.ids = torch.cat([torch.tensor(padded).flatten().to(device), read.flatten()])

        before = lengths.to(device)[self._prompt_of].unsqueeze(-1)  # (B, 1) prompt tokens before a response
        step, place = (torch.arange(n, device=device) for n in (self.steps, self.longest_prompt + self.steps))
        within = place[: self.longest_prompt]
        self.positions = torch.cat([within.repeat(self._prompts), (before + step).flatten()])
        self._visible_in_prompts = within <= within.unsqueeze(-1)  # (P, P)
        # Keys are P of the prompt, padding included, and R of the response; queries see none that come later.
        self._visible = place <= self.longest_prompt + step.unsqueeze(-1)  # (R, P + R)
        if int(lengths.min()) < self.longest_prompt:
            is_token = (place < before) | (place >= self.longest_prompt)  # (B, P + R)
            self._visible = self._visible & is_token[:, None, None]  # (B, 1, R, P + R)

        row, step = rollouts.mask.nonzero(as_tuple=True)
        last_of_prompt = self._prompt_of[row] * self.longest_prompt + before[row, 0] - 1
        self.predicting = torch.where(step == 0, last_of_prompt, self._in_prompts + row * self.steps + step - 1)
        """(N,) int64 place of the token whose state predicts each response token."""

    @property
    def _in_prompts(self) -> int:
        return self._prompts * self.longest_prompt

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See :data:`tgpo_lab.models.known_decoders.Attend`."""
        parts = [x.split([self._in_prompts, self._rows * self.steps]) for x in (query, key, value)]
        # (p, P, heads, head width): padding stands on the right, where no token sees it
        prompts = [prompt.unflatten(0, (self._prompts, self.longest_prompt)) for prompt, _ in parts]
        mixed = _tokens_first(*prompts, self._visible_in_prompts)
        if not self.steps:
            return mixed
        query, key, value = (response.unflatten(0, (self._rows, self.steps)) for _, response in parts)
        key, value = (
            torch.cat([prompt.index_select(0, self._prompt_of), own], 1)  # (B, P + R, key-value heads, head width)
            for prompt, own in zip(prompts[1:], (key, value), strict=True)
        )
        return torch.cat([mixed, _tokens_first(query, key, value, self._visible)])


def _tokens_first(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Attention with tokens before heads, as projections give them: (B, T, heads, width) → (B·T, heads × width)."""
    mixed = attention(*(x.transpose(1, 2) for x in (query, key, value)), visible)
    return mixed.transpose(1, 2).flatten(0, 1).flatten(1)
