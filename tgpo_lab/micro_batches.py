"""Splitting a batch into parts that fit in memory. A split changes nothing but rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from .rollouts import Rollouts


def padded_tokens(rollouts: Rollouts) -> int:
    """Tokens of all rows as one micro-batch: rows × longest sequence."""
    lengths = torch.tensor([len(p) for p in rollouts.prompts]) + rollouts.lengths.cpu()
    return len(rollouts) * int(lengths.max()) if len(rollouts) else 0


def split_rows(rollouts: Rollouts, micro_batch_tokens: int) -> list[Tensor]:
    """Row indices of micro-batches: rows × longest sequence ≤ ``micro_batch_tokens`` each.

    Rows of similar length go together, so that little padding is computed. A single row longer
    than the limit is a micro-batch of its own.

    Raises:
        ValueError: the limit is below 1.
    """
    if micro_batch_tokens < 1:
        raise ValueError(f"micro_batch_tokens must be 1 or more, but is {micro_batch_tokens}.")
    lengths = torch.tensor([len(p) for p in rollouts.prompts]) + rollouts.lengths.cpu()
    order = lengths.argsort(stable=True).tolist()
    parts: list[list[int]] = [[]]
    for row in order:  # ascending, so the row to be added is the longest of its part
        if parts[-1] and (len(parts[-1]) + 1) * int(lengths[row]) > micro_batch_tokens:
            parts.append([])
        parts[-1].append(row)
    return [torch.tensor(part, device=rollouts.responses.device) for part in parts if part]
