"""Rollouts: prompts with the responses that a policy wrote to them, padded, with true masks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rollouts:
    """Responses to prompts. Rows of one prompt stand together (groups of G).

    Masks come from lengths, never from comparing ids with the padding id: the padding token is
    often the end-of-sequence token as well.
    """

    prompts: list[list[int]]
    """Token ids of each row's prompt, without padding."""
    responses: Tensor
    """(B, T) int64, padded on the right with ``pad_token``; a finished response ends with its end-of-sequence token."""
    mask: Tensor
    """(B, T) bool: True on response tokens, the end-of-sequence token included."""
    finished: Tensor
    """(B,) bool: the response ended by itself and was not cut at the token limit."""
    pad_token: int
    logprobs: Tensor | None = None
    """(B, T) log-probabilities under which the tokens were drawn, as the engine computed them; None if unknown. They
    differ from the update's by rounding: see :mod:`tgpo_lab.importance`."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> Tensor:
        """(B,) number of response tokens."""
        return self.mask.sum(-1)

    def to(self, device: torch.device) -> Rollouts:
        """The same with its tensors on ``device``."""
        tensors = {name: getattr(self, name).to(device) for name in ("responses", "mask", "finished")}
        return replace(self, **tensors, logprobs=None if self.logprobs is None else self.logprobs.to(device))

    def rows(self, index: Tensor) -> Rollouts:
        """The rows ``index`` (int64), response padding cut to the longest of them."""
        mask = self.mask[index]
        longest = max(1, int(mask.sum(-1).max())) if len(index) else 1
        return Rollouts(
            [self.prompts[i] for i in index.tolist()],
            self.responses[index, :longest],
            mask[:, :longest],
            self.finished[index],
            self.pad_token,
            None if self.logprobs is None else self.logprobs[index, :longest],
        )

    def sequences(self) -> tuple[Tensor, Tensor]:
        """Prompt and response of each row joined, padded on the RIGHT alone, and the prompt lengths.

        With nothing on the left, a causal model needs no attention mask and positions are 0, 1, 2, …

        Returns:
            tokens (B, longest sequence) int64 and prompt lengths (B,) int64.
        """
        device = self.responses.device
        prompt_lengths = torch.tensor([len(p) for p in self.prompts])
        lengths = prompt_lengths + self.lengths.cpu()
        tokens = torch.full((len(self), int(lengths.max())), self.pad_token)
        responses = self.responses.cpu()
        for row, prompt in enumerate(self.prompts):
            start, end = len(prompt), int(lengths[row])
            tokens[row, :start] = torch.tensor(prompt)
            tokens[row, start:end] = responses[row, : end - start]
        return tokens.to(device), prompt_lengths.to(device)

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Decoded responses without the token that ended them; any other special token stays visible."""
        kept = [row[mask].tolist() for row, mask in zip(self.responses.cpu(), self.mask.cpu(), strict=True)]
        # Were special tokens skipped, "#1<unk>2" would read as the answer 12.
        kept = [ids[:-1] if done else ids for ids, done in zip(kept, self.finished.tolist(), strict=True)]
        return tokenizer.batch_decode(kept)


def join_rollouts(parts: list[Rollouts]) -> Rollouts:
    """Rows of several rollouts one after the other, padded to the longest. Log-probabilities that one of them has and
    another has not are zeros there."""
    width = max(part.responses.shape[1] for part in parts)

    def widen(part: Rollouts, name: str, fill: float) -> Tensor:
        tensor = getattr(part, name)
        if tensor is None:
            tensor = torch.zeros(part.mask.shape, device=part.mask.device)
        return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=fill)

    return Rollouts(
        [prompt for part in parts for prompt in part.prompts],
        torch.cat([widen(part, "responses", part.pad_token) for part in parts]),
        torch.cat([widen(part, "mask", False) for part in parts]),
        torch.cat([part.finished for part in parts]),
        parts[0].pad_token,
        None if all(part.logprobs is None for part in parts) else torch.cat([widen(p, "logprobs", 0.0) for p in parts]),
    )
