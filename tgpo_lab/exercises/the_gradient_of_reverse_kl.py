"""Exercises of notebook 04."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..losses import reverse_kl_per_token, sampled_kl
from .checking import Exercise


def _logits() -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(4)
    return [
        tuple(torch.randn(size, generator=random, dtype=torch.float64) for _ in range(2))  # type: ignore[misc]
        for size in (5, 3)
    ]


def _gradient_by_autograd(student, teacher):
    student = student.clone().requires_grad_()
    return torch.autograd.grad(reverse_kl_per_token(student, teacher), student)[0]


def _parts(student, teacher):
    """Probabilities of the student, log-ratios d, and the score of each token (V, V)."""
    probabilities = student.softmax(-1)
    scores = torch.eye(len(student), dtype=student.dtype) - probabilities
    return probabilities, student.log_softmax(-1) - teacher.log_softmax(-1), scores


def _unweighted(student, teacher):
    _, d, scores = _parts(student, teacher)
    return d @ scores


def _uniform(student, teacher):
    return _unweighted(student, teacher) / len(student)


def _one_hot_alone(student, teacher):
    probabilities, d, _ = _parts(student, teacher)
    return probabilities * d


def _weighed_by_teacher(student, teacher):
    _, d, scores = _parts(student, teacher)
    return (teacher.softmax(-1) * d) @ scores


def _transposed(student, teacher):
    probabilities, d, scores = _parts(student, teacher)
    return scores @ (probabilities * d)


def _forward_gradient(student, teacher):
    return student.softmax(-1) - teacher.softmax(-1)


def _raw_logits(student, teacher):
    return (student.exp() * (student - teacher)) @ (torch.eye(len(student), dtype=student.dtype) - student.exp())


def _raw_weights(student, teacher):
    return (student.exp() * (student - teacher)) @ _parts(student, teacher)[2]


def _weighted_mean(weights_of, divisor_of=None):
    """Σ w·d / Σ w with weights w made of probabilities (V,) and scores (V, V), as a function like the learner's."""

    def baseline(student, teacher):
        probabilities, d, scores = _parts(student, teacher)
        divisor = (divisor_of or weights_of)(probabilities, scores).sum()
        return (weights_of(probabilities, scores) * d).sum() / divisor

    return baseline


def _lengths(probabilities, scores):
    return probabilities * scores.square().sum(-1)


_best_baseline = _weighted_mean(_lengths)


def _sampled(estimator: str) -> Callable:
    def loss(student, teacher, token):
        return sampled_kl(student.log_softmax(-1)[token], teacher.log_softmax(-1)[token], estimator)

    return loss


def _policy_gradient(student, teacher, token):
    return _sampled("k1")(student, teacher, token).detach() * student.log_softmax(-1)[token]


def _same_for_every_token(student, teacher, token):
    """Policy gradient whose advantage knows the teacher, but not the token: its mean is zero."""
    return reverse_kl_per_token(student, teacher).detach() * student.log_softmax(-1)[token]


def _likelihood(student, teacher, token):
    """Raises what is probable already; has a gradient, but nothing of the teacher in it."""
    return -student.softmax(-1)[token]


def _value_alone(student, teacher, token):
    """Has the teacher in its value, for all tokens alike, and nowhere in its gradient."""
    return student.softmax(-1)[token] + teacher.softmax(-1).max()


def _losses() -> list[tuple]:
    (student, teacher), _ = _logits()
    other = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5], dtype=torch.float64)
    losses = (
        _sampled("k1"),
        _sampled("k2"),
        _sampled("k3"),
        _policy_gradient,
        _same_for_every_token,
        _likelihood,
        _value_alone,
    )
    # With two tokens of probability ½ nothing is rounded: what cancels in the mean is exactly zero.
    even = torch.zeros(2, dtype=torch.float64)
    exact = (_same_for_every_token, even, torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 2.0]).double())
    # The third token is never drawn. A sum without weights sees it and differs; with weights both are zero.
    unused = (_same_for_every_token, *(torch.tensor(x).double() for x in ([0, 0, -1000], [1, 0, 0], [0, 2, 0])))
    return [(loss, student, teacher, other) for loss in losses] + [exact, unused]


def _weighted_gradient(loss, student, teacher, *, through_weights: bool = False, equal_weights: bool = False):
    student = student.clone().requires_grad_()
    weights = torch.ones_like(student) if equal_weights else student.softmax(-1)
    if not through_weights:
        weights = weights.detach()
    total = sum(weight * loss(student, teacher, token) for token, weight in enumerate(weights))
    return torch.autograd.grad(total, student)[0]


def _listens(loss, student, teacher, other):
    return not torch.allclose(
        _weighted_gradient(loss, student, teacher), _weighted_gradient(loss, student, other), atol=1e-6
    )


def _no_tolerance(loss, student, teacher, other):
    return not torch.equal(_weighted_gradient(loss, student, teacher), _weighted_gradient(loss, student, other))


def _through_weights(loss, student, teacher, other):
    return not torch.allclose(
        _weighted_gradient(loss, student, teacher, through_weights=True),
        _weighted_gradient(loss, student, other, through_weights=True),
        atol=1e-6,
    )


def _unweighted_sum(loss, student, teacher, other):
    gradients = [_weighted_gradient(loss, student, each, equal_weights=True) for each in (teacher, other)]
    return not torch.allclose(*gradients, atol=1e-6)


def _values_differ(loss, student, teacher, other):
    return any(
        not torch.allclose(loss(student, teacher, token), loss(student, other, token)) for token in range(len(student))
    )


def _any_gradient(loss, student, teacher, other):
    return bool(_weighted_gradient(loss, student, teacher).abs().max() > 1e-6)


def _single_tokens(loss, student, teacher, other):
    def gradient(teacher_now, token):
        logits = student.clone().requires_grad_()
        return torch.autograd.grad(loss(logits, teacher_now, token), logits)[0]

    return any(
        not torch.allclose(gradient(teacher, token), gradient(other, token), atol=1e-6) for token in range(len(student))
    )


def _as_bool(function, *arguments):
    """A tensor with one truth value is as good as a bool."""
    result = function(*arguments)
    return bool(result) if isinstance(result, torch.Tensor) and result.numel() == 1 else result


EXERCISES = (
    Exercise(
        "04.1",
        "the score function, without autograd",
        _gradient_by_autograd,
        _logits,
        {
            "The probabilities are missing: a token counts as often as the student draws it.": _unweighted,
            "This is a mean over the vocabulary; weigh each token by how often the student draws it.": _uniform,
            "The score is more than a one at the token: subtract all probabilities from it. As it is, the entries do "
            "not add up to zero.": _one_hot_alone,
            "You weighed by the teacher's probabilities, but the student draws the samples.": _weighed_by_teacher,
            "You multiplied by the score matrix from the wrong side. Its rows are the scores, so the weights stand in "
            "front: weights @ scores.": _transposed,
            "These are logits, and the formula needs log-probabilities: take log_softmax first.": (
                _raw_logits,
                _raw_weights,
            ),
            "This is πθ − πT, the gradient of the forward KL.": _forward_gradient,
            "The sign is the wrong way round: this is the direction to go, and the gradient of the loss is minus "
            "that.": lambda student, teacher: -_gradient_by_autograd(student, teacher),
        },
    ),
    Exercise(
        "04.2",
        "does this loss listen to the teacher?",
        _listens,
        _losses,
        {
            "The loss differs between the teachers, but training uses its gradient. k1 has another value and the same "
            "gradient.": _values_differ,
            "You differentiated the probabilities of drawing a token as well. backward on a sample does not see them: "
            "detach the weights.": _through_weights,
            "A gradient that is not zero need not know the teacher: compare the gradients under the two teachers.": (
                _any_gradient
            ),
            "The tokens are added without weights: a token counts as often as the student draws it.": _unweighted_sum,
            "Two gradients that are equal on paper differ by rounding here: compare them with a tolerance, as "
            "torch.allclose does.": _no_tolerance,
            "What depends on the teacher for single tokens can cancel in the mean: weigh the tokens by the student's "
            "probabilities and add them up first.": _single_tokens,
            "It is the other way round: True is for a loss that depends on the teacher.": (
                lambda *arguments: not _listens(*arguments)
            ),
        },
        observe=_as_bool,
    ),
    Exercise(
        "04.3",
        "the best baseline",
        _best_baseline,
        _logits,
        {
            "This is the mean of d, a good baseline. The best one weighs each token by the squared length of its "
            "score, too.": reverse_kl_per_token,
            "The scores' lengths must be squared.": _weighted_mean(lambda p, scores: p * scores.norm(dim=-1)),
            "The student's probabilities are missing from the weights.": (
                _weighted_mean(lambda p, scores: scores.square().sum(-1))
            ),
            "The student's probabilities are missing below the fraction bar: that is E[‖s‖²], a mean as well.": (
                _weighted_mean(_lengths, lambda p, scores: scores.square().sum(-1))
            ),
            "‖s‖² is more than (1 − π(v))²: all other entries of the score, −π(u), count as well.": (
                _weighted_mean(lambda p, scores: p * (1 - p).square())
            ),
            "You summed over the columns of the score matrix. The score of a token is its row: sum over the last "
            "dimension.": _weighted_mean(lambda p, scores: p * scores.square().sum(0)),
            "The division by the sum of the weights is missing: the result is a weighted mean of d.": (
                _weighted_mean(_lengths, lambda p, scores: torch.ones(1))
            ),
            "The sign is the wrong way round: b is subtracted from d = log πθ − log πT.": (
                lambda student, teacher: -_best_baseline(student, teacher)
            ),
        },
    ),
)
