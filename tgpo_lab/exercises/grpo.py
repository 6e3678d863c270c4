"""Exercises of notebook 07."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses import group_advantages
from .checking import Exercise


def _rewards() -> list[tuple[Tensor, int]]:
    return [
        (torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]), 4),
        (torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.2, 0.2, 0.2]), 3),
    ]


def _normalized(groups: Tensor, dimension: int = -1, correction: int = 1) -> Tensor:
    centred = groups - groups.mean(dimension, keepdim=True)
    return torch.nan_to_num(centred / groups.std(dimension, correction=correction, keepdim=True))


def _unguarded(rewards: Tensor, group_size: int) -> Tensor:
    groups = rewards.view(-1, group_size)
    return ((groups - groups.mean(-1, keepdim=True)) / groups.std(-1, keepdim=True)).flatten()


def _ratios() -> list[tuple[Tensor, Tensor, float, float, float]]:
    old = torch.tensor(-2.0)
    return [
        (old + torch.tensor(shift), old, advantage, 0.2, 0.28)
        for shift in (-0.6, 0.1, 0.6)
        for advantage in (-1.5, 1.0)
    ]


def _value_and_gradient(function, logprob, old_logprob, advantage, low, high):
    """The objective of one token and its gradient by log πθ; 0 where none reaches it."""
    logprob = logprob.clone().requires_grad_()
    value = function(logprob, old_logprob, advantage, low, high)
    if not isinstance(value, Tensor):
        return value
    if not value.requires_grad:
        return value, torch.zeros(())
    gradient = torch.autograd.grad(value, logprob)[0]
    return value.detach(), gradient


def _surrogate(logprob, old_logprob, advantage, low, high):
    ratio = (logprob - old_logprob).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def _informative(accuracies: Tensor, group_size: int) -> Tensor:
    return (1 - accuracies**group_size - (1 - accuracies) ** group_size).sum()


def _accuracies() -> list[tuple[Tensor, int]]:
    return [(torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0]), 2), (torch.tensor([0.03, 0.6, 0.97]), 8)]


EXERCISES = (
    Exercise(
        "07.1",
        "group advantages",
        group_advantages,
        _rewards,
        {
            "Mean and deviation are taken over the whole batch; a sample is compared with the samples of its own "
            "prompt alone.": lambda rewards, group_size: _normalized(rewards),
            "Rows of one prompt stand together: the first group is the first G rows, not every G-th row.": (
                lambda rewards, group_size: _normalized(rewards.view(group_size, -1), 0).flatten()
            ),
            "The division by the group's standard deviation is missing.": (
                lambda rewards, group_size: group_advantages(rewards, group_size, normalize_std=False)
            ),
            "This standard deviation has G in its denominator; here it is G − 1, what std() gives by itself.": (
                lambda rewards, group_size: _normalized(rewards.view(-1, group_size), correction=0).flatten()
            ),
            "A group with equal rewards gave 0/0, which is not a number: give its samples advantage 0.": _unguarded,
            "The shape should be that of the rewards, (B,): flatten the groups at the end.": (
                lambda rewards, group_size: group_advantages(rewards, group_size).view(-1, group_size)
            ),
        },
        tolerance=2e-3,  # a small number added to the deviation is no mistake
    ),
    Exercise(
        "07.2",
        "the clipped surrogate of one token",
        _surrogate,
        _ratios,
        {
            "The ratio is πθ/π_old: take exp() of the difference of the log-probabilities.": (
                lambda logprob, old, advantage, low, high: torch.minimum(
                    (logprob - old) * advantage, (logprob - old).clamp(1 - low, 1 + high) * advantage
                )
            ),
            "The minimum is missing: the clipped product alone also stops a token that has moved the wrong way.": (
                lambda logprob, old, advantage, low, high: (logprob - old).exp().clamp(1 - low, 1 + high) * advantage
            ),
            "This is the larger of the two products; the surrogate takes the smaller, the more cautious one.": (
                lambda logprob, old, advantage, low, high: torch.maximum(
                    (logprob - old).exp() * advantage, (logprob - old).exp().clamp(1 - low, 1 + high) * advantage
                )
            ),
            "The sign is that of the loss; the surrogate itself is to be made large.": (
                lambda *arguments: -_surrogate(*arguments)
            ),
            "The upper bound is 1 + high, and high differs from low here.": (
                lambda logprob, old, advantage, low, high: _surrogate(logprob, old, advantage, low, low)
            ),
            "The values are right, but no gradient reaches log πθ: do not detach it.": (
                lambda logprob, *others: _surrogate(logprob.detach(), *others)
            ),
        },
        observe=_value_and_gradient,
    ),
    Exercise(
        "07.3",
        "expected number of informative groups",
        _informative,
        _accuracies,
        {
            "Groups in which all samples are right are counted too; their advantages are zero as well.": (
                lambda accuracies, group_size: (1 - (1 - accuracies) ** group_size).sum()
            ),
            "These are the groups without any signal; take the others.": (
                lambda accuracies, group_size: (accuracies**group_size + (1 - accuracies) ** group_size).sum()
            ),
            "You used the mean accuracy for every prompt. Prompts differ: sum the chance of each.": (
                lambda accuracies, group_size: len(accuracies) * _informative(accuracies.mean()[None], group_size)
            ),
            "This is a share of the prompts; the expected number is the sum.": (
                lambda accuracies, group_size: _informative(accuracies, group_size) / len(accuracies)
            ),
            "This is the variance of one reward; what counts is that G samples are neither all right nor all wrong.": (
                lambda accuracies, group_size: (accuracies * (1 - accuracies)).sum()
            ),
        },
    ),
)
