"""The updates of one batch: which groups each learns from."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import TrainConfig
from ..randomness import generator_for


def mini_batches(config: TrainConfig, prompts: int, step: int) -> list[Tensor]:
    """Group numbers of each update, (N,) int64: ``passes`` × ``mini_batches`` parts, shuffled anew for each pass."""
    generator = generator_for(config.seed, "mini-batches", step)
    updates: list[Tensor] = []
    for _ in range(config.passes):
        updates += torch.randperm(prompts, generator=generator).tensor_split(config.mini_batches)
    return updates


def rows_of_groups(groups: Tensor, size: int, prompts: int, traces: int) -> Tensor:
    """Rows of some groups: the student's, then the teacher's traces to the same prompts.

    Args:
        groups: (N,) int64 numbers of groups.
        size: responses of the student in a group.
        prompts: groups in the whole batch, whose rows come before all traces.
        traces: responses of the teacher to each prompt.

    Returns:
        (N·size + N·traces,) int64.
    """
    own = (groups.unsqueeze(-1) * size + torch.arange(size)).flatten()
    theirs = (prompts * size + groups.unsqueeze(-1) * traces + torch.arange(traces)).flatten()
    return torch.cat([own, theirs])
