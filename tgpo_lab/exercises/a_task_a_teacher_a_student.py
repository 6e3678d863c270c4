"""Exercises of notebook 02."""

from __future__ import annotations

import math
import re

import torch

from ..tasks.rewards import marked_answer
from .checking import Exercise


def _judged() -> list[tuple[str, str]]:
    responses = (
        " the sum is #168",
        "<think> ones 7+5=12;</think> #168",
        "# 168 ",
        " the sum is #167",
        " the sum is 168",
        "168",
        " #168 #170",
        " #170 #168",
        " #1681",
        " #160 161 168",
        " #168 or so",
        " #0168",
        " #168.0",
        " #１６８",
        " #1 6 8",
        "#",
        "",
    )
    return [(response, "168") for response in responses]


def _first_mark(response, answer):
    return float(response.partition("#")[2].strip(" ") == answer)


def _second_part(response, answer):
    parts = response.split("#")
    return float(len(parts) > 1 and parts[1].strip() == answer)


def _without_a_mark(response, answer):
    return float(response.split("#")[-1].strip(" ") == answer)


def _spaces_refused(response, answer):
    _, mark, said = response.rpartition("#")
    return float(bool(mark) and said == answer)


def _as_numbers(response, answer):
    _, mark, said = response.rpartition("#")
    try:
        return float(bool(mark) and int(said) == int(answer))
    except ValueError:
        return 0.0


def _as_floats(response, answer):
    _, mark, said = response.rpartition("#")
    try:
        return float(bool(mark) and float(said) == float(answer))
    except ValueError:
        return 0.0


def _first_number(response, answer):
    found = re.match(r" *([0-9]+)", response.rpartition("#")[2]) if "#" in response else None
    return float(found is not None and found[1] == answer)


def _contained_after_mark(response, answer):
    return float("#" in response and answer in response.rpartition("#")[2])


def _counts() -> list[tuple[list[int], int, int]]:
    return [([0, 1, 4, 10], 10, 3), ([2, 3], 8, 8), ([5, 1, 0], 6, 1)]


def _pass_at_k(right, n, k):
    return sum(1 - math.comb(n - c, k) / math.comb(n, k) for c in right) / len(right)


def _with_replacement(right, n, k):
    return sum(1 - (1 - c / n) ** k for c in right) / len(right)


def _all_right(right, n, k):
    return sum(math.comb(c, k) / math.comb(n, k) for c in right) / len(right)


def _not_all_right(right, n, k):
    return 1 - _all_right(right, n, k)


def _each_prompt(right, n, k):
    return [_pass_at_k([c], n, k) for c in right]


def _pooled(right, n, k):
    return 1 - math.comb(n * len(right) - sum(right), k) / math.comb(n * len(right), k)


def _written() -> list[tuple]:
    random = torch.Generator().manual_seed(2)
    mask = torch.arange(6) < torch.tensor([[6], [2], [3]])
    student = -6 * torch.rand(3, 6, generator=random)
    teacher = (student - 12 * torch.rand(3, 6, generator=random) + 3).clamp(max=-0.1)
    student, teacher = student.masked_fill(~mask, 0.0), teacher.masked_fill(~mask, -20.0)
    student[0, 1:3], teacher[0, 1:3] = torch.tensor([-1.0, -0.5]), torch.tensor([-5.0, -2.5])  # exactly a threshold
    return [(student, teacher, mask, threshold) for threshold in (4.0, 2.0)]


def _rejected(student_logprobs, teacher_logprobs, mask, threshold):
    return ((student_logprobs - teacher_logprobs)[mask] > threshold).float().mean().item()


def _threshold_too(student_logprobs, teacher_logprobs, mask, threshold):
    return ((student_logprobs - teacher_logprobs)[mask] >= threshold).float().mean().item()


def _ratio(student_logprobs, teacher_logprobs, mask, threshold):
    return ((student_logprobs - teacher_logprobs)[mask].exp() > threshold).float().mean().item()


def _counted(student_logprobs, teacher_logprobs, mask, threshold):
    return _rejected(student_logprobs, teacher_logprobs, mask, threshold) * mask.sum().item()


def _padding_above_the_bar(student_logprobs, teacher_logprobs, mask, threshold):
    return (((student_logprobs - teacher_logprobs) > threshold).sum() / mask.sum()).item()


def _either_sign(student_logprobs, teacher_logprobs, mask, threshold):
    return ((student_logprobs - teacher_logprobs)[mask].abs() > threshold).float().mean().item()


def _other_way_round(student_logprobs, teacher_logprobs, mask, threshold):
    return _rejected(teacher_logprobs, student_logprobs, mask, threshold)


def _padding_counted(student_logprobs, teacher_logprobs, mask, threshold):
    return ((student_logprobs - teacher_logprobs) > threshold).float().mean().item()


def _divided_by_places(student_logprobs, teacher_logprobs, mask, threshold):
    return (((student_logprobs - teacher_logprobs) > threshold) & mask).float().mean().item()


def _mean_of_rows(student_logprobs, teacher_logprobs, mask, threshold):
    rejected = ((student_logprobs - teacher_logprobs) > threshold) & mask
    return (rejected.sum(-1) / mask.sum(-1)).mean().item()


def _improbable(student_logprobs, teacher_logprobs, mask, threshold):
    return (-teacher_logprobs[mask] > threshold).float().mean().item()


def _number(function, *arguments):
    """A tensor is as good as a float, with several numbers as good as a list of them."""
    result = function(*arguments)
    if not isinstance(result, torch.Tensor):
        return result
    return result.item() if result.numel() == 1 else result.tolist()


EXERCISES = (
    Exercise(
        "02.1",
        "a reward",
        marked_answer,
        _judged,
        {
            "The answer may stand anywhere in the response. Only what comes after the last # is the answer given.": (
                lambda response, answer: float(answer in response)
            ),
            "The text after the mark contains the answer, but it must be nothing else: 1681 contains 168 too.": (
                _contained_after_mark
            ),
            "You took the first #. A response that names several answers has named the last one.": _first_mark,
            "Without a # no answer was given, but yours takes the whole response for it.": _without_a_mark,
            "You read what stands between the first # and the next; the last one counts.": _second_part,
            "Spaces around the number are allowed: strip them.": _spaces_refused,
            "Compared as numbers, 0168 and digits of other scripts pass. Compare the text.": _as_numbers,
            "Compared as numbers with a point, 168.0 passes. Compare the text.": _as_floats,
            "You read the first number after the mark and not what follows it: a list of guesses passes.": (
                _first_number
            ),
        },
    ),
    Exercise(
        "02.2",
        "pass@k",
        _pass_at_k,
        _counts,
        {
            "This draws with putting back: 1 − (1 − c/n)^k. It is biased; count the draws of k out of n instead.": (
                _with_replacement
            ),
            "C(c, k)/C(n, k) is the chance that all k are right; for pass@k one right sample is enough.": _all_right,
            "1 − C(c, k)/C(n, k) is the chance that not all k are right. Count the draws from the n − c wrong samples "
            "in place of the c right ones.": _not_all_right,
            "This is one number for each prompt; take their mean.": _each_prompt,
            "You counted all prompts as one. Estimate each prompt by itself, then take the mean: prompts are not "
            "alike.": _pooled,
            "This is the chance that all k are wrong; pass@k is one minus it.": (
                lambda right, n, k: 1 - _pass_at_k(right, n, k)
            ),
            "This is the share of prompts with any right sample at all, which is pass@n.": (
                lambda right, n, k: _pass_at_k(right, n, n)
            ),
            "This is the share of right samples, which is pass@1: k plays no part in it.": (
                lambda right, n, k: _pass_at_k(right, n, 1)
            ),
            "You added the prompts up; take their mean.": lambda right, n, k: _pass_at_k(right, n, k) * len(right),
        },
        observe=_number,
    ),
    Exercise(
        "02.3",
        "the rejected share",
        _rejected,
        _written,
        {
            "The difference is the wrong way round: rejected is what the teacher finds less probable.": (
                _other_way_round
            ),
            "Exactly the threshold is not above it.": _threshold_too,
            "Padding was counted as if it had been written: select with the mask first.": _padding_counted,
            "You divided by the number of tokens, but counted padding above the fraction bar: select with the mask "
            "first.": _padding_above_the_bar,
            "This is a count; the share is that divided by the number of tokens.": _counted,
            "The threshold is in nats, so it is a difference of log-probabilities. You compared exp() of it, which is "
            "a ratio of probabilities.": _ratio,
            "You divided by all places; divide by the number of tokens, which is the sum of the mask.": (
                _divided_by_places
            ),
            "This is a mean of the rows' shares; take all tokens together.": _mean_of_rows,
            "You took the size of the difference, whatever its sign: what the teacher finds more probable is not "
            "rejected.": _either_sign,
            "You looked at the teacher alone. A token is rejected when it is less probable than under the student by "
            "more than the threshold.": _improbable,
        },
        observe=_number,
    ),
)
