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


def _no_exponential(logprob, samples):
    return 1 / -logprob, 1 - (1 + logprob) ** samples


def _logits() -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(7)
    return [
        (torch.randn(3, 5, generator=random), torch.randn(3, 5, generator=random)),
        (4 * torch.randn(2, 7, generator=random), 4 * torch.randn(2, 7, generator=random)),
    ]


def _moment(name):
    return lambda student, teacher: signal_moments(student, teacher)[name]


def _sum_over_tokens(weight, advantage, norm, reduce=torch.sum):
    """Σ_v of the product of three functions of (log πθ, log πT), as a function like the learner's."""

    def moment(student_logits, teacher_logits):
        both = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
        return reduce(weight(*both) * advantage(*both) * norm(*both), -1)

    return moment


def _policy(student, teacher):
    return student.exp()


def _squared_advantage(student, teacher):
    return (teacher - student).square()


def _squared_score(student, teacher):
    policy = student.exp()
    return 1 - 2 * policy + policy.square().sum(-1, keepdim=True)


def _raw_logits(student, teacher):
    return (_policy(student, teacher) * _squared_advantage(student, teacher) * _squared_score(student, teacher)).sum(-1)


def _raw_advantages(student, teacher):
    both = student.log_softmax(-1), teacher.log_softmax(-1)
    return (_policy(*both) * _squared_advantage(student, teacher) * _squared_score(*both)).sum(-1)


EXERCISES = (
    Exercise(
        "06.1",
        "how long until a token is drawn",
        _waiting,
        _draws,
        {
            "You took −log p for p. exp() turns a log-probability into a probability.": _no_exponential,
            "The two are in the wrong order: the expected number of samples comes first.": (
                lambda logprob, samples: _waiting(logprob, samples)[::-1]
            ),
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
            "The second number is the smaller of 1 and n·p. Draws that come twice are counted twice in n·p: take the "
            "probability of not one in n samples from 1.": (
                lambda logprob, samples: (1 / math.exp(logprob), min(1.0, samples * math.exp(logprob)))
            ),
            "The second number is 1 − pⁿ, the probability that not all n are this token. At least one: take (1 − p)ⁿ "
            "from 1.": lambda logprob, samples: (1 / math.exp(logprob), 1 - math.exp(logprob) ** samples),
            "The second number is for n − 1 samples; all n are drawn.": (
                lambda logprob, samples: (1 / math.exp(logprob), _waiting(logprob, samples - 1)[1])
            ),
            "The second number is the probability of not one in n samples; take it from 1.": (
                lambda logprob, samples: (_waiting(logprob, samples)[0], 1 - _waiting(logprob, samples)[1])
            ),
        },
        parts=("the expected number of samples", "the probability of at least one"),
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
                lambda student, teacher: teacher.exp(), _squared_advantage, _squared_score
            ),
            "The advantage is not squared.": _sum_over_tokens(
                _policy, lambda student, teacher: teacher - student, _squared_score
            ),
            "‖e_v − π‖² is missing: this is the second moment of the advantage, not of the gradient.": _sum_over_tokens(
                _policy, _squared_advantage, lambda student, teacher: 1
            ),
            "‖e_v − π‖² is more than (1 − π(v))²: all other entries of the vector, −π(u), count as well.": (
                _sum_over_tokens(_policy, _squared_advantage, lambda student, teacher: (1 - student.exp()).square())
            ),
            "The norm ‖e_v − π‖ is not squared.": _sum_over_tokens(
                _policy, _squared_advantage, lambda student, teacher: _squared_score(student, teacher).sqrt()
            ),
            "The weight πθ(v) is missing: a token counts as often as the student draws it.": _sum_over_tokens(
                lambda student, teacher: 1, _squared_advantage, _squared_score
            ),
            "πθ(v) is inside the square: it is the weight of the mean, and stands outside.": (
                _sum_over_tokens(lambda student, teacher: (2 * student).exp(), _squared_advantage, _squared_score)
            ),
            "These are logits, and the formula needs log-probabilities: take log_softmax(-1) of both first.": (
                _raw_logits,
                _raw_advantages,
            ),
            "This is the mean over the vocabulary; the tokens are weighed by πθ(v) already, so take the sum.": (
                _sum_over_tokens(_policy, _squared_advantage, _squared_score, torch.mean)
            ),
        },
    ),
)
