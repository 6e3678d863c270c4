"""Exercises of notebook 07."""

from __future__ import annotations

from collections.abc import Callable

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


def _moved() -> list[tuple[Tensor, Tensor, Tensor, float, float]]:
    # 1.29 and 0.79: outside the clip, but their logarithms are within 0.28 and 0.2 + 0.04 of 0.
    ratios = torch.tensor([0.5, 0.75, 0.79, 0.9, 1.0, 1.1, 1.25, 1.29, 1.5])
    old = torch.linspace(-3, -1, 9).expand(3, 9)
    advantages = torch.tensor([[1.0], [-1.5], [0.0]]).expand(3, 9)
    return [(old + ratios.log(), old, advantages, 0.2, high) for high in (0.28, 0.2)]


def _stopped(logprobs, old_logprobs, advantages, low, high):
    """By autograd, so that no condition is written down twice."""
    logprobs = logprobs.clone().requires_grad_()
    ratio = (logprobs - old_logprobs).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    return torch.autograd.grad(surrogate.sum(), logprobs)[0] == 0


def _by_conditions(where: Callable[..., Tensor]) -> Callable:
    """A function like the learner's from a condition on ratio, advantages, low and high."""
    return lambda logprobs, old, advantages, low, high: where((logprobs - old).exp(), advantages, low, high)


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
            "The group's mean is not subtracted.": (
                lambda rewards, group_size: torch.nan_to_num(
                    rewards.view(-1, group_size) / rewards.view(-1, group_size).std(-1, keepdim=True), posinf=0.0
                ).flatten()
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
        "which tokens have stopped",
        _stopped,
        _moved,
        {
            "Every token outside the clip range is counted. One that has moved the wrong way is still pulled back: the "
            "minimum takes the plain product there.": _by_conditions(
                lambda ratio, a, low, high: (ratio > 1 + high) | (ratio < 1 - low) | (a == 0)
            ),
            "It is the other two corners: a wanted token stops above the range, an unwanted one below it.": (
                _by_conditions(
                    lambda ratio, a, low, high: (a > 0) & (ratio < 1 - low) | (a < 0) & (ratio > 1 + high) | (a == 0)
                )
            ),
            "Tokens with advantage 0 are missing: whatever their ratio is, 0 times it has no gradient.": _by_conditions(
                lambda ratio, a, low, high: (a > 0) & (ratio > 1 + high) | (a < 0) & (ratio < 1 - low)
            ),
            "You compared the difference of the log-probabilities with the widths; the ratio is its exp().": (
                lambda logprobs, old, a, low, high: (
                    (a > 0) & (logprobs - old > high) | (a < 0) & (logprobs - old < -low) | (a == 0)
                )
            ),
            "low and high are swapped: low is the width below 1, high the one above.": _by_conditions(
                lambda ratio, a, low, high: (a > 0) & (ratio > 1 + low) | (a < 0) & (ratio < 1 - high) | (a == 0)
            ),
            "The ratio is upside down: it is the student now over the student that sampled.": _by_conditions(
                lambda ratio, a, low, high: (
                    (a > 0) & (1 / ratio > 1 + high) | (a < 0) & (1 / ratio < 1 - low) | (a == 0)
                )
            ),
            "The upper bound is 1 + high, and high can differ from low.": _by_conditions(
                lambda ratio, a, low, high: (a > 0) & (ratio > 1 + low) | (a < 0) & (ratio < 1 - low) | (a == 0)
            ),
            "Only wanted tokens are considered; one with an advantage below zero stops as well, below 1 − low.": (
                _by_conditions(lambda ratio, a, low, high: (a > 0) & (ratio > 1 + high) | (a == 0))
            ),
            "It is the other way round: True is for a token without gradient.": lambda *arguments: (
                ~_stopped(*arguments)
            ),
        },
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
