"""Exercises of notebook 03."""

from __future__ import annotations

import torch

from ..losses import forward_kl_per_token, reverse_kl_per_token
from .checking import Exercise


def _logits() -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(3)
    return [
        (torch.randn(2, 3, 5, generator=random), torch.randn(2, 3, 5, generator=random)),
        (200 * torch.randn(1, 2, 4, generator=random), torch.randn(1, 2, 4, generator=random)),
    ]


def _both(student, teacher):
    return forward_kl_per_token(student, teacher), reverse_kl_per_token(student, teacher)


def _gradient_by_autograd(student, teacher):
    student = student.clone().requires_grad_()
    return torch.autograd.grad(reverse_kl_per_token(student, teacher).sum(), student)[0]


def _without_mean(student, teacher):
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    return student.exp() * (student - teacher)


def _forward_gradient(student, teacher):
    return student.softmax(-1) - teacher.softmax(-1)


def _by_logarithm(student, teacher):
    student, teacher = student.softmax(-1), teacher.softmax(-1)
    ratio = (student / teacher).log()
    return -(teacher * ratio).sum(-1), (student * ratio).sum(-1)


EXERCISES = (
    Exercise(
        "03.1",
        "both KLs from logits",
        _both,
        _logits,
        {
            "The two are in the wrong order: the one weighed by the teacher is the forward KL and comes first.": (
                lambda student, teacher: _both(student, teacher)[::-1]
            ),
            "The signs are the wrong way round: a KL is never below zero.": (
                lambda student, teacher: tuple(-value for value in _both(student, teacher))
            ),
            "These are means over the vocabulary; the formula has a sum over it.": (
                lambda student, teacher: tuple(value / student.shape[-1] for value in _both(student, teacher))
            ),
            "You summed over all positions; keep one number for each: sum over the last dimension alone.": (
                lambda student, teacher: tuple(value.sum() for value in _both(student, teacher))
            ),
            "Right for small logits, but not finite for large ones: use log_softmax, not the logarithm of a softmax.": (
                _by_logarithm
            ),
        },
    ),
    Exercise(
        "03.2",
        "the gradient of reverse KL",
        _gradient_by_autograd,
        _logits,
        {
            "The mean is missing: subtract the position's reverse KL from the log-ratio. As it is, the entries do not "
            "add up to zero.": _without_mean,
            "This is πθ − πT, the gradient of the forward KL.": _forward_gradient,
            "The sign is the wrong way round: the gradient points uphill, and descent subtracts it.": (
                lambda student, teacher: -_gradient_by_autograd(student, teacher)
            ),
        },
    ),
)
