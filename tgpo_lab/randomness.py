"""Random generators derived from the seed and a purpose, so that no random state has to be stored.

What step 40 samples depends on the seed and on "step 40, sampling", never on what was drawn before.
That makes resuming exact, and gives every method of a comparison the same prompts and the same
random numbers at the same step.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def derived_seed(seed: int, *purpose: str | int) -> int:
    """63-bit seed for one purpose, for example ``derived_seed(0, "sampling", 40)``."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_for(seed: int, *purpose: str | int) -> torch.Generator:
    """CPU generator for one purpose."""
    return torch.Generator().manual_seed(derived_seed(seed, *purpose))


def rows_of_step(seed: int, step: int, per_step: int, available: int) -> list[int]:
    """Which training prompts a step uses: a new permutation of all for each pass through the data."""
    rows: list[int] = []
    position = step * per_step
    while len(rows) < per_step:
        epoch, offset = divmod(position, available)
        order = torch.randperm(available, generator=generator_for(seed, "order", epoch))
        taken = order[offset : offset + per_step - len(rows)].tolist()
        rows += taken
        position += len(taken)
    return rows


def at_most(count: int, mask: Tensor, generator: torch.Generator) -> Tensor:
    """At most ``count`` of the true places of a mask, drawn at random: (B, T) bool → (B, T) bool."""
    row, step = mask.nonzero(as_tuple=True)
    chosen = torch.randperm(len(row), generator=generator)[:count].to(mask.device)
    kept = torch.zeros_like(mask)
    kept[row[chosen], step[chosen]] = True
    return kept
