"""Exercises of notebook 12."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .checking import Exercise


def _prompts() -> list[tuple[list[list[int]], int]]:
    # The padding token stands in the second batch's prompts as well.
    return [([[7, 15, 8, 16], [7, 15], [9, 9, 4]], 1), ([[1, 5], [5, 1, 1, 6]], 1)]


def _padded(prompts: list[list[int]], pad_token: int, *, left: bool = True) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    tokens, mask = [], []
    for prompt in prompts:
        filling, zeros = [pad_token] * (longest - len(prompt)), [0] * (longest - len(prompt))
        tokens.append(filling + prompt if left else prompt + filling)
        mask.append(zeros + [1] * len(prompt) if left else [1] * len(prompt) + zeros)
    return torch.tensor(tokens), torch.tensor(mask)


def _pad_left(prompts, pad_token):
    tokens, mask = _padded(prompts, pad_token)
    return tokens, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def _pad_right(prompts, pad_token):
    tokens, mask = _padded(prompts, pad_token, left=False)
    return tokens, mask, (mask.cumsum(-1) - 1) * mask


def _with_positions(positions: Callable[[Tensor], Tensor]) -> Callable:
    """A function like the learner's that counts positions from the mask as it is told."""

    def pad(prompts, pad_token):
        tokens, mask = _padded(prompts, pad_token)
        return tokens, mask, positions(mask)

    return pad


def _mask_from_ids(prompts, pad_token):
    tokens, _ = _padded(prompts, pad_token)
    mask = (tokens != pad_token).long()
    return tokens, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def _mask_upside_down(prompts, pad_token):
    tokens, mask, positions = _pad_left(prompts, pad_token)
    return tokens, 1 - mask, positions


def _boxed() -> list[tuple[str, str]]:
    responses = (
        "so it is \\boxed{72}.",
        "so it is \\boxed{ 72 }.",
        "\\boxed{71}, no: \\boxed{72}",
        "\\boxed{72}, no: \\boxed{71}",
        "72",
        "boxed{72}",
        "72}",
        "\\boxed{172}",
        "\\boxed{72, or 71}",
        "\\boxed{72",
        "it is \\boxed{71} or {72}",
        "it is \\boxed{72} or {71}",
        "\\boxed{}",
        "",
    )
    halves = ("\\boxed{\\frac{1}{2}} in all", "\\boxed{\\frac{1}{2}", "\\boxed{\\frac{1}{3}}")
    return [(response, "72") for response in responses] + [(response, "\\frac{1}{2}") for response in halves]


def _inside(response: str, *, first: bool = False) -> str | None:
    """What the last (or first) box holds, spaces and all; None without a box that is closed."""
    _, mark, rest = response.partition("\\boxed{") if first else response.rpartition("\\boxed{")
    depth = 0
    for place, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return rest[:place] if mark else None
    return None


def _boxed_answer(response, answer):
    inside = _inside(response)
    return float(inside is not None and inside.strip() == answer)


def _first_box(response, answer):
    inside = _inside(response, first=True)
    return float(inside is not None and inside.strip() == answer)


def _spaces_refused(response, answer):
    return float(_inside(response) == answer)


def _contained(response, answer):
    return float(answer in (_inside(response) or ""))


def _to_the_first_brace(response, answer):
    _, mark, rest = response.rpartition("\\boxed{")
    inside, brace, _ = rest.partition("}")
    return float(bool(mark and brace) and inside.strip() == answer)


def _to_the_last_brace(response, answer):
    _, mark, rest = response.rpartition("\\boxed{")
    inside, brace, _ = rest.rpartition("}")
    return float(bool(mark and brace) and inside.strip() == answer)


def _unclosed_allowed(response, answer):
    _, mark, rest = response.rpartition("\\boxed{")
    inside = _inside(response)
    return float(bool(mark) and (rest if inside is None else inside).strip() == answer)


def _without_a_mark(response, answer):
    return _boxed_answer("\\boxed{" + response.rpartition("\\boxed{")[2], answer)


def _cards() -> list[tuple[int, int, int, int]]:
    gb = 10**9
    return [
        (80 * gb, 15 * gb // 10, 4 * gb, 151_936),
        (24 * gb, 5 * gb // 10, 2 * gb, 151_936),
        (24 * gb, 2 * gb, gb, 32_000),
    ]


def _fitting(student_bytes: int, teacher_bytes: int, logit_bytes: int) -> Callable:
    """Positions that fit, with so many bytes for each parameter and each number of the logits."""

    def positions(card: int, student_parameters: int, teacher_parameters: int, vocabulary: int) -> int:
        room = card - student_bytes * student_parameters - teacher_bytes * teacher_parameters
        return max(room, 0) // (logit_bytes * vocabulary)

    return positions


_positions_that_fit = _fitting(16, 2, 4)  # weights, gradient and two moments in float32; bfloat16; float32


def _no_floor_at_zero(card, student_parameters, teacher_parameters, vocabulary):
    return (card - 16 * student_parameters - 2 * teacher_parameters) // (4 * vocabulary)


def _not_whole(card, student_parameters, teacher_parameters, vocabulary):
    return max(card - 16 * student_parameters - 2 * teacher_parameters, 0) / (4 * vocabulary)


EXERCISES = (
    Exercise(
        "12.1",
        "prompts of unequal length",
        _pad_left,
        _prompts,
        {
            "The padding stands on the right; then there is a gap between a short prompt and its response. Put it on "
            "the left.": (
                _pad_right,
                lambda prompts, pad: (*_padded(prompts, pad, left=False), _pad_left(prompts, pad)[2]),
            ),
            "Positions count from 0: the first real token has 0, so subtract 1 from the running sum, and keep the "
            "padding at 0.": _with_positions(lambda mask: mask.cumsum(-1)),
            "The padding has position −1; put 0 there.": _with_positions(lambda mask: mask.cumsum(-1) - 1),
            "Positions are counted from the padding: a short prompt must have the positions that it has alone.": (
                _with_positions(lambda mask: torch.arange(mask.shape[1]).expand_as(mask))
            ),
            "The mask is made from the ids, and a prompt may hold the padding token itself: use the lengths.": (
                _mask_from_ids
            ),
            "The mask is the other way round: 1 is for real tokens, 0 for padding.": _mask_upside_down,
        },
        parts=("tokens", "mask", "positions"),
    ),
    Exercise(
        "12.2",
        "a reward for boxed answers",
        _boxed_answer,
        _boxed,
        {
            "You took the first box. A response that corrects itself has its answer in the last one.": _first_box,
            "Spaces around the answer are allowed: strip them.": _spaces_refused,
            "The box contains the answer, but it must hold nothing else: 172 contains 72, too.": _contained,
            "The box ends at the first closing brace for you. It may hold braces of its own: count them.": (
                _to_the_first_brace
            ),
            "The box ends at the last closing brace of the response for you: count the braces.": _to_the_last_brace,
            "A box that is never closed is no answer.": _unclosed_allowed,
            "There need be no box for you: look at the mark that rpartition returns, which is empty without one.": (
                _without_a_mark
            ),
            "The answer may stand anywhere for you; only the last box counts.": (
                lambda response, answer: float(answer in response)
            ),
        },
    ),
    Exercise(
        "12.3",
        "what still fits?",
        _positions_that_fit,
        _cards,
        {
            "Where the weights alone do not fit the number is 0, not below it.": _no_floor_at_zero,
            "A whole number of positions is asked for: divide with //.": _not_whole,
            "AdamW is missing: it keeps two float32 numbers for each of the student's parameters.": _fitting(8, 2, 4),
            "The gradient is missing: 4 bytes for each of the student's parameters.": _fitting(12, 2, 4),
            "The teacher is not trained: it needs its bfloat16 weights alone, 2 bytes each.": _fitting(16, 16, 4),
            "The teacher's weights are bfloat16, 2 bytes each, not 4.": _fitting(16, 4, 4),
            "The logits are float32, 4 bytes each, not 2.": _fitting(16, 2, 2),
            "Each number of the logits takes 4 bytes, not 1.": _fitting(16, 2, 1),
            "The teacher's weights are missing: 2 bytes each.": _fitting(16, 0, 4),
            "These are the weights alone, 4 bytes each: training needs gradient and AdamW's moments, 16 in all.": (
                _fitting(4, 2, 4)
            ),
            "Student and teacher are swapped.": lambda card, student, teacher, vocabulary: _positions_that_fit(
                card, teacher, student, vocabulary
            ),
        },
        tolerance=1e-9,
    ),
)
