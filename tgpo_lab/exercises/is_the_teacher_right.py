"""Exercises of notebook 09."""

from __future__ import annotations

import torch
from torch import Tensor

from ..guidance import teacher_doubt, trust_horizon_gate
from ..tasks.rewards import marked_answer
from .checking import Exercise


def _continuations() -> list[tuple[list[str], list[str], list[bool], list[str]]]:
    return [
        (
            ["", " the sum is #1", " the", " the sum is #160", " the sum is #170"],
            [
                "<think> tens</think> #168",
                "68",
                " sum is #170",
                "<think> tens</think> #168",
                "<think> was it 168</think> #170",
            ],
            [True, True, True, True, True],
            ["168"] * 5,
        ),
        (
            [" the sum is #4", " the sum", " the sum is #48", " the"],
            ["8", " is #48", "", " sum is #4"],
            [True, False, True, False],
            ["48"] * 4,
        ),
    ]


def _judged(prefixes, continuations) -> list[str]:
    return [prefix + continuation for prefix, continuation in zip(prefixes, continuations, strict=True)]


def _reliability(prefixes, continuations, finished, answers):
    texts = _judged(prefixes, continuations)
    right = [marked_answer(t, a) if f else 0.0 for t, f, a in zip(texts, finished, answers, strict=True)]
    return sum(right) / len(right)


def _without_prefix(prefixes, continuations, finished, answers):
    return _reliability([""] * len(prefixes), continuations, finished, answers)


def _cut_counts(prefixes, continuations, finished, answers):
    return _reliability(prefixes, continuations, [True] * len(finished), answers)


def _cut_left_out(prefixes, continuations, finished, answers):
    kept = [place for place, done in enumerate(finished) if done]
    columns = (prefixes, continuations, finished, answers)
    return _reliability(*([column[place] for place in kept] for column in columns))


def _prefix_alone(prefixes, continuations, finished, answers):
    return _reliability(prefixes, [""] * len(prefixes), finished, answers)


def _anywhere(prefixes, continuations, finished, answers):
    texts = _judged(prefixes, continuations)
    right = [float(a in t) if f else 0.0 for t, f, a in zip(texts, finished, answers, strict=True)]
    return sum(right) / len(right)


def _logprobs() -> list[tuple[Tensor, float]]:
    random = torch.Generator().manual_seed(9)
    made = [-3 * torch.rand(2, 6, generator=random) for _ in range(3)]
    made[1][0, 2] = -14.0
    return list(zip(made, (0.9, 0.5, 1.0), strict=True))


def _doubt(teacher_logprobs, memory):
    return teacher_doubt(teacher_logprobs, "sum", memory)


def _running(teacher_logprobs, step, shifted=True):
    """D along the tokens by a rule for one step, before each token or (not shifted) with it."""
    doubts, doubt = [], torch.zeros(len(teacher_logprobs))
    for surprise in (-teacher_logprobs).unbind(-1):
        before, doubt = doubt, step(doubt, surprise)
        doubts.append(before if shifted else doubt)
    return torch.stack(doubts, -1)


def _batches() -> list[tuple[Tensor, Tensor, Tensor, float]]:
    teacher = -torch.tensor(
        # The last row has a surprise of exactly 4 and of exactly 2: not above the threshold.
        [[0.1, 3.0, 9.0, 0.2, 0.1, 6.0, 0.3], [14.0, 0.1, 0.1, 2.0, 0.0, 0.0, 0.0], [0.5, 2.0, 4.0, 0.3, 0.2, 0.0, 0.0]]
    )
    student = -torch.tensor(
        [[0.3, 0.2, 4.5, 0.1, 5.0, 1.0, 0.2], [0.1, 0.1, 7.0, 2.2, 0.0, 0.0, 0.0], [2.5, 0.1, 0.4, 0.2, 0.1, 0.0, 0.0]]
    )
    mask = torch.arange(7) < torch.tensor([7, 4, 5])[:, None]
    return [(student, teacher, mask, threshold) for threshold in (4.0, 2.0, 5.5)]


def _horizon(student_logprobs, teacher_logprobs, mask, threshold):
    return trust_horizon_gate(teacher_doubt(teacher_logprobs, "worst_token", 1.0), threshold) & mask


def _without_departure(student_logprobs, teacher_logprobs, mask, threshold):
    return (-teacher_logprobs <= threshold).int().cumprod(-1).bool() & mask


def _one_more(student_logprobs, teacher_logprobs, mask, threshold):
    allowed = _horizon(student_logprobs, teacher_logprobs, torch.ones_like(mask), threshold)
    later = torch.ones_like(allowed)
    later[:, 1:] = allowed[:, :-1]
    return later & mask


def _last_token_alone(student_logprobs, teacher_logprobs, mask, threshold):
    return trust_horizon_gate(teacher_doubt(teacher_logprobs, "worst_token", 0.0), threshold) & mask


def _added_up(student_logprobs, teacher_logprobs, mask, threshold):
    return trust_horizon_gate(teacher_doubt(teacher_logprobs, "sum", 1.0), threshold) & mask


EXERCISES = (
    Exercise(
        "09.1",
        "reliability from continuations",
        _reliability,
        _continuations,
        {
            "You judged the continuation alone. A number that the student began can be finished by the teacher: judge "
            "prefix and continuation as one response.": _without_prefix,
            "A continuation that was cut at the limit has not given its answer: it counts as wrong, whatever stands in "
            "it.": _cut_counts,
            "You left the cut continuations out of the count. They are wrong, not missing: divide by the number of all "
            "prefixes.": _cut_left_out,
            "You judged the prefix alone, which the student wrote. The question is where the teacher gets to.": (
                _prefix_alone
            ),
            "You looked for the answer anywhere in the text. What counts is what stands after the last #: use "
            "marked_answer.": _anywhere,
            "This is the number of right continuations; divide by the number of prefixes.": (
                lambda *arguments: _reliability(*arguments) * len(arguments[0])
            ),
            "This is the share of wrong continuations; take it from 1.": lambda *arguments: (
                1 - _reliability(*arguments)
            ),
            "You put something between prefix and continuation. The student may have begun a number that the teacher "
            "finishes: join them without a space.": (
                lambda prefixes, *others: _reliability([prefix + " " for prefix in prefixes], *others)
            ),
        },
    ),
    Exercise(
        "09.2",
        "doubt with a memory",
        _doubt,
        _logprobs,
        {
            "The token at t itself is in your D_t. Doubt is about the prefix, the tokens before t: D at position 0 is "
            "0.": lambda logprobs, memory: _running(logprobs, lambda d, s: memory * d + s, shifted=False),
            "The sign is the wrong way round: a surprise is minus a log-probability, and doubt is never below 0.": (
                lambda logprobs, memory: -_doubt(logprobs, memory)
            ),
            "You faded the newest surprise as well. It enters in full; λ multiplies only what was there before.": (
                lambda logprobs, memory: _running(logprobs, lambda d, s: memory * (d + s))
            ),
            "Nothing fades here: multiply D_{t−1} by λ before you add.": lambda logprobs, memory: _doubt(logprobs, 1.0),
            "This is a moving average, with the newest surprise times 1 − λ. Doubt adds the surprise itself.": (
                lambda logprobs, memory: _running(logprobs, lambda d, s: memory * d + (1 - memory) * s)
            ),
            "This is the last surprise alone: what was there before, times λ, is to be added to it.": (
                lambda logprobs, memory: _running(logprobs, lambda d, s: s)
            ),
            "This keeps the largest faded surprise; the exercise asks for their sum.": (
                lambda logprobs, memory: teacher_doubt(logprobs, "worst_token", memory)
            ),
        },
    ),
    Exercise(
        "09.3",
        "a trust horizon",
        _horizon,
        _batches,
        {
            "The departure itself is missing. The prefix before it is still believable, and the teacher's answer there "
            "is what the student should have written.": _without_departure,
            "One position too many: after the departure the prefix holds it already.": _one_more,
            "A surprise of exactly τ is not above it.": (
                lambda student, teacher, mask, threshold: _horizon(student, teacher, mask, threshold - 1e-4)
            ),
            "You compared the probability with the threshold; a surprise is −log of it, in nats.": (
                lambda student, teacher, mask, threshold: _horizon(student, -teacher.exp(), mask, threshold)
            ),
            "You left out the surprising tokens alone and kept all after them. Once a departure is in the prefix "
            "it stays there: this horizon does not come back.": (
                lambda student, teacher, mask, threshold: (-teacher <= threshold) & mask
            ),
            "You looked at the last token alone, so the horizon comes back one position after the departure. It has to "
            "stay shut.": _last_token_alone,
            "You used the student's log-probabilities. What counts is what the teacher finds improbable.": (
                lambda student, teacher, mask, threshold: _horizon(teacher, student, mask, threshold)
            ),
            "You used the difference log πθ − log πT. The horizon looks at −log πT alone, whatever the student "
            "thinks.": lambda student, teacher, mask, threshold: _horizon(student, teacher - student, mask, threshold),
            "You added the surprises up. Here the worst token of the prefix decides, by itself.": _added_up,
            "The mask is not used: positions after the end of a response must be False.": (
                lambda student, teacher, mask, threshold: _horizon(student, teacher, torch.ones_like(mask), threshold)
            ),
            "This is the other side: you kept what lies beyond the horizon.": (
                lambda student, teacher, mask, threshold: ~_horizon(student, teacher, mask, threshold) & mask
            ),
        },
    ),
)
