"""Exercises of notebook 06."""

from __future__ import annotations

import math

import torch

from ..diagnostics.gradient_signal import signal_moments
from .checking import Exercise


def _draws() -> list[tuple[float, int]]:
    return [(-0.5, 1), (-1.45, 3), (-9.0, 3000), (-13.0, 500000)]


def _waiting(logprob, samples):
    probability = math.exp(logprob)
    return 1 / probability, -math.expm1(samples * math.log1p(-probability))


def _logits() -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(7)
    return [
        (torch.randn(3, 5, generator=random), torch.randn(3, 5, generator=random)),
        (4 * torch.randn(2, 7, generator=random), 4 * torch.randn(2, 7, generator=random)),
    ]


def _moment(name):
    return lambda student, teacher: signal_moments(student, teacher)[name]


def _sum_over_tokens(weight, reward, norm):
    """Σ_v of the product of three functions of (log πθ, log πT), as a function like the learner's."""

    def moment(student_logits, teacher_logits):
        both = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
        return (weight(*both) * reward(*both) * norm(*both)).sum(-1)

    return moment


def _policy(student, teacher):
    return student.exp()


def _squared_reward(student, teacher):
    return (teacher - student).square()


def _squared_score(student, teacher):
    policy = student.exp()
    return 1 - 2 * policy + policy.square().sum(-1, keepdim=True)


EXERCISES = (
    Exercise(
        "06.1",
        "how long until a token is drawn",
        _waiting,
        _draws,
        {
            "The first number is the probability itself; the expected number of samples is one over it.": (
                lambda logprob, samples: (math.exp(logprob), _waiting(logprob, samples)[1])
            ),
            "The first number is −log p, which is nats and not samples: take exp() of it.": (
                lambda logprob, samples: (-logprob, _waiting(logprob, samples)[1])
            ),
            "The log-probability is in nats: e to its power, not 10.": (
                lambda logprob, samples: _waiting(logprob * math.log(10), samples)
            ),
            "The first number counts the samples before the token; count the one that draws it as well.": (
                lambda logprob, samples: (1 / math.exp(logprob) - 1, _waiting(logprob, samples)[1])
            ),
            "The second number is n·p, the expected count, which can exceed 1; asked for is the probability of at "
            "least one.": lambda logprob, samples: (1 / math.exp(logprob), samples * math.exp(logprob)),
            "The second number is the probability of not one in n samples; take it from 1.": (
                lambda logprob, samples: (_waiting(logprob, samples)[0], 1 - _waiting(logprob, samples)[1])
            ),
        },
    ),
    Exercise(
        "06.2",
        "the second moment",
        _moment("policy_gradient_second_moment"),
        _logits,
        {
            "This is the variance: nothing is to be subtracted from the second moment.": (
                _moment("policy_gradient_variance")
            ),
            "This is the squared norm of the mean gradient; take the mean of the squared norms.": (
                _moment("exact_squared_norm")
            ),
            "The tokens are weighed by the teacher: they are drawn from the student.": _sum_over_tokens(
                lambda student, teacher: teacher.exp(), _squared_reward, _squared_score
            ),
            "The reward is not squared.": _sum_over_tokens(
                _policy, lambda student, teacher: teacher - student, _squared_score
            ),
            "‖e_v − π‖² is missing: this is the second moment of the reward, not of the gradient.": _sum_over_tokens(
                _policy, _squared_reward, lambda student, teacher: 1
            ),
            "‖e_v − π‖² is more than (1 − π(v))²: all other entries of the vector, −π(u), count as well.": (
                _sum_over_tokens(_policy, _squared_reward, lambda student, teacher: (1 - student.exp()).square())
            ),
            "The norm ‖e_v − π‖ is not squared.": _sum_over_tokens(
                _policy, _squared_reward, lambda student, teacher: _squared_score(student, teacher).sqrt()
            ),
        },
    ),
)
