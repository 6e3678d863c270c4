"""Checks of exercises: a learner's function is compared with a right one, and with wrong ones that have names.

A check never raises. It says what is wrong, and where the result is that of a known mistake, which one. Its value as
a number is the points earned, so that nbgrader can grade the cell that ends with it.
"""

from __future__ import annotations

import copy
import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Exercise:
    """What a learner's function is measured by."""

    number: str
    """Notebook and place in it, for instance ``01.2``."""
    title: str
    reference: Callable
    """A function that is right, best the library's own."""
    cases: Callable[[], Sequence[tuple]]
    """Makes the arguments of a few calls, the same ones each time."""
    mistakes: Mapping[str, Callable] = field(default_factory=dict)
    """What to tell a learner → a function that makes that mistake."""
    observe: Callable = lambda function, *arguments: function(*arguments)
    """What of a call is compared: by default its result; a gradient, for instance, needs more than the call."""
    tolerance: float = 1e-4
    """Largest difference between equal numbers, absolute and relative."""
    points: int = 1


class CheckResult:
    """Outcome of a check: shown as a sentence in a notebook, as the points earned in plain text."""

    def __init__(self, exercise: Exercise, passed: bool, message: str):
        self.exercise, self.passed, self.message = exercise, passed, message

    @property
    def points(self) -> float:
        """Points earned."""
        return float(self.exercise.points if self.passed else 0)

    def __repr__(self) -> str:
        return str(self.points)  # nbgrader reads a check's plain text as the points earned

    def _repr_html_(self) -> str:
        state, color, style = ("Right", "#0072b2", "solid") if self.passed else ("Not yet", "#d55e00", "dashed")
        return (
            f'<div style="border-left: 4px {style} {color}; padding: 2px 10px">'
            f"<b>{state}</b> · exercise {html.escape(self.exercise.number)}, {html.escape(self.exercise.title)}<br>"
            f"{html.escape(self.message)}</div>"
        )


def check_function(exercise: Exercise, function: Callable) -> CheckResult:
    """Compare a learner's function with the exercise's reference, case by case."""
    if not callable(function):
        return CheckResult(exercise, False, f"The check takes a function, but was given {_shown(function)}.")
    got: list[object] = []
    for number, arguments in enumerate(exercise.cases(), 1):
        try:
            got.append(exercise.observe(function, *copy.deepcopy(arguments)))
        except NotImplementedError:
            return CheckResult(exercise, False, "Nothing here yet: put your own lines in place of the last one.")
        except Exception as error:  # whatever a learner's code raises is shown, not passed on
            sentence = f"{_case(number, arguments)}: your function raised {type(error).__name__}: {error}"
            return CheckResult(exercise, False, sentence[:600])
    wanted = _outcomes(exercise, exercise.reference)
    if all(_equal(a, b, exercise.tolerance) for a, b in zip(got, wanted, strict=True)):
        return CheckResult(exercise, True, f"Same results as the reference on {len(wanted)} cases.")
    for message, wrong in exercise.mistakes.items():
        if all(_equal(a, b, exercise.tolerance) for a, b in zip(got, _outcomes(exercise, wrong), strict=True)):
            return CheckResult(exercise, False, message)
    return CheckResult(exercise, False, _difference(exercise, got, wanted))


def _outcomes(exercise: Exercise, function: Callable) -> list[object]:
    return [exercise.observe(function, *copy.deepcopy(arguments)) for arguments in exercise.cases()]


def _equal(given: object, wanted: object, tolerance: float) -> bool:
    if isinstance(wanted, tuple | list):
        return (
            isinstance(given, tuple | list)
            and len(given) == len(wanted)
            and all(_equal(a, b, tolerance) for a, b in zip(given, wanted, strict=True))
        )
    if isinstance(wanted, Tensor):
        if not isinstance(given, Tensor) or given.shape != wanted.shape:
            return False
        return torch.allclose(given.double(), wanted.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
    if isinstance(wanted, float | int) and not isinstance(wanted, bool):
        try:
            number = float(given)  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError):
            return False
        return number == wanted or math.isclose(number, wanted, rel_tol=tolerance, abs_tol=tolerance)
    return type(given) is type(wanted) and given == wanted


def _difference(exercise: Exercise, got: Sequence[object], wanted: Sequence[object]) -> str:
    """The first case that differs with what it was called with, in one sentence."""
    number, given, right, arguments = next(
        (n, a, b, arguments)
        for n, (a, b, arguments) in enumerate(zip(got, wanted, exercise.cases(), strict=True), 1)
        if not _equal(a, b, exercise.tolerance)
    )
    if given is None:
        return "Your function returned None: is a return missing?"
    case = _case(number, arguments)
    if isinstance(right, Tensor) and not isinstance(given, Tensor):
        return f"{case}: expected a tensor of shape {tuple(right.shape)}, but got {_shown(given)}."
    if isinstance(right, Tensor) and given.shape != right.shape:
        return f"{case}: expected the shape {tuple(right.shape)}, but got {tuple(given.shape)}."
    return f"{case}: expected {_shown(right)}, but got {_shown(given)}."


def _case(number: int, arguments: Sequence[object]) -> str:
    return f"Case {number}, called with ({', '.join(_shown(argument) for argument in arguments)})"


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        value = value.detach()
        if not value.ndim:
            return f"a tensor {_rounded(value.item())}"
        text = f"a tensor {[_rounded(x) for x in value.flatten()[:6].tolist()]}" + (" …" if value.numel() > 6 else "")
        return text if value.ndim == 1 else f"{text} of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        text = ", ".join(_shown(item) for item in value)
        text = f"({text})" if isinstance(value, tuple) else f"[{text}]"
    elif callable(value):
        text = getattr(value, "__name__", type(value).__name__).lstrip("_")
    else:
        text = f"{value:.4g}" if isinstance(value, float) else repr(value)
    return text if len(text) < 120 else text[:117] + "…"


def _rounded(value: float) -> float:
    return round(value, 4)
