"""Exercises of notebook 03."""

from __future__ import annotations

import torch

from ..losses import forward_kl_per_token, reverse_kl_per_token
from .checking import Exercise, Told


def _logits() -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(3)
    return [
        (torch.randn(2, 3, 5, generator=random), torch.randn(2, 3, 5, generator=random)),
        (200 * torch.randn(1, 2, 4, generator=random), torch.randn(1, 2, 4, generator=random)),
    ]


def _both(student, teacher):
    return forward_kl_per_token(student, teacher), reverse_kl_per_token(student, teacher)


def _sums(weights, terms):
    """A function like the learner's from the weights and the terms of its two sums, made of (log πθ, log πT)."""

    def kls(student, teacher):
        both = student.log_softmax(-1), teacher.log_softmax(-1)
        return tuple((w.exp() * term).sum(-1) for w, term in zip(weights(*both), terms(*both), strict=True))

    return kls


def _log_ratios(student, teacher):
    return teacher - student, student - teacher


def _cross_entropies(student, teacher):
    return -student, -teacher


def _changed(change):
    """A function like the learner's that changes both KLs."""
    return lambda student, teacher: tuple(change(kl, student.shape[-1]) for kl in _both(student, teacher))


def _raw(student, teacher):
    return (teacher.exp() * (teacher - student)).sum(-1), (student.exp() * (student - teacher)).sum(-1)


def _raw_ratio(student, teacher):
    return tuple((w.softmax(-1) * (w - u)).sum(-1) for w, u in ((teacher, student), (student, teacher)))


def _not_summed(student, teacher):
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    return teacher.exp() * (teacher - student), student.exp() * (student - teacher)


def _by_logarithm(student, teacher):
    student, teacher = student.softmax(-1), teacher.softmax(-1)
    ratio = (student / teacher).log()
    return -(teacher * ratio).sum(-1), (student * ratio).sum(-1)


def _policy(student, teacher):
    return student.exp()


def _weighed(weight, subtracted=lambda kl: kl):
    """πθ(v)(log-ratio − KL) with another factor in front or something in place of the KL, as the learner's function."""

    def gradient(student, teacher):
        student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
        ratio = student - teacher
        return weight(student, teacher) * (ratio - subtracted((student.exp() * ratio).sum(-1, keepdim=True)))

    return gradient


_gradient = _weighed(_policy)


def _forward_gradient(student, teacher):
    return student.softmax(-1) - teacher.softmax(-1)


def _told(*_):
    raise Told("Without autograd: write the formula itself, with log_softmax, exp and sums.")


def _without_autograd(function, student, teacher):
    """The result of a call in which nothing may be kept for a derivative, which every way to have one does."""
    try:
        with torch.autograd.graph.saved_tensors_hooks(_told, _told):
            return function(student, teacher)
    except RuntimeError as error:
        if "saved tensor hooks" in str(error):  # how torch.func refuses to run
            _told()
        raise


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
            "The signs are the wrong way round: a KL is never below zero.": _changed(lambda kl, vocabulary: -kl),
            "These are means over the vocabulary; the formula has a sum over it.": (
                _changed(lambda kl, vocabulary: kl / vocabulary)
            ),
            "You summed over all positions; keep one number for each: sum over the last dimension alone.": (
                _changed(lambda kl, vocabulary: kl.sum())
            ),
            "The weight must be the distribution in the numerator: exp(log πT) for forward, exp(log πθ) for reverse.": (
                _sums(lambda student, teacher: (student, teacher), _log_ratios),
                _sums(lambda student, teacher: (teacher, teacher), _log_ratios),
                _sums(lambda student, teacher: (student, student), _log_ratios),
            ),
            "This is a cross-entropy; take the log-ratio, which subtracts the entropy.": (
                _sums(lambda student, teacher: (teacher, student), _cross_entropies)
            ),
            "These are logits, and a KL needs log-probabilities: take log_softmax(-1) of both first.": (
                _raw,
                _raw_ratio,
            ),
            "The sum over the vocabulary is missing: sum over the last dimension.": _not_summed,
            "You took the mean over the positions; keep one number for each: sum over the last dimension alone.": (
                _changed(lambda kl, vocabulary: kl.mean()),
                _changed(lambda kl, vocabulary: kl.mean() / vocabulary),
                _changed(lambda kl, vocabulary: kl.sum() / len(kl)),
            ),
            "Right for small logits, but not finite for large ones: use log_softmax, not the logarithm of a softmax.": (
                _by_logarithm
            ),
        },
        parts=("the forward KL", "the reverse KL"),
    ),
    Exercise(
        "03.2",
        "the gradient of reverse KL",
        _gradient,
        _logits,
        {
            "The mean is missing: subtract the position's reverse KL from the log-ratio. As it is, the entries do not "
            "add up to zero.": _weighed(_policy, lambda kl: 0),
            "This is πθ − πT, the gradient of the forward KL.": _forward_gradient,
            "The sign is the wrong way round: the gradient points uphill, and descent subtracts it.": (
                lambda student, teacher: -_gradient(student, teacher)
            ),
            "The factor πθ(v) in front is missing; it is why rare tokens feel nothing.": (
                _weighed(lambda student, teacher: 1)
            ),
            "The factor in front is πT(v); the expectation is under the student, so it is πθ(v).": (
                _weighed(lambda student, teacher: teacher.exp())
            ),
            "Each position has its own KL: sum over the last dimension with keepdim=True.": (
                _weighed(_policy, lambda kl: kl.mean()),
                _weighed(_policy, lambda kl: kl.sum()),
            ),
            "You divided by the number of positions; each position is on its own here, so nothing is averaged.": (
                lambda student, teacher: _gradient(student, teacher) / student[..., 0].numel()
            ),
            "The + 1 is from the derivative by the probabilities. By the logits, the softmax puts −KL in its place.": (
                _weighed(_policy, lambda kl: -1)
            ),
        },
        _without_autograd,
    ),
)
