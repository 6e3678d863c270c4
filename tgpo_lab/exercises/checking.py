"""Checks of exercises: a learner's function is compared with a right one, and with wrong ones that have names.

A check never raises. It says what is wrong, and where the result is that of a known mistake, which one. Its value as
a number is the points earned, so that nbgrader can grade the cell that ends with it.
"""

from __future__ import annotations

import copy
import html
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

LONGEST_MESSAGE = 600
_COUNTS = ("no", "one", "two", "three", "four", "five", "six")


class Told(Exception):
    """Raised by what observes a call that cannot be compared: a sentence that tells the learner why."""


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
    mistakes: Mapping[str, Callable | tuple[Callable, ...]] = field(default_factory=dict)
    """What to tell a learner → a function that makes that mistake, or several that deserve the same sentence."""
    observe: Callable = lambda function, *arguments: function(*arguments)
    """What of a call is compared: by default its result; a gradient, for instance, needs more than the call."""
    tolerance: float = 1e-4
    """Largest difference between equal numbers, absolute and relative."""
    points: int = 1
    observed: str = ""
    """What is compared, in words, where it is not what the function returns."""
    parts: tuple[str, ...] = ()
    """Names of the results, where a call gives several."""

    def wrong_functions(self) -> Iterator[tuple[str, Callable]]:
        """Each function that makes a known mistake, after what to tell a learner about it."""
        for message, wrong in self.mistakes.items():
            for function in wrong if isinstance(wrong, tuple) else (wrong,):
                yield message, function


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
    try:
        wrong = _what_is_wrong(exercise, function)
    except Exception as error:  # a result may be of a kind that cannot even be compared or shown
        wrong = f"What your function returned cannot be compared: {type(error).__name__}: {str(error)[:300]}"
    return CheckResult(exercise, not wrong, wrong or f"Same results as the reference on {len(exercise.cases())} cases.")


def _what_is_wrong(exercise: Exercise, function: Callable) -> str:
    """What to tell of the first case that is wrong, so that no exception hides a wrong value before it."""
    cases = exercise.cases()
    got = [_outcome(exercise, function, number, arguments) for number, arguments in enumerate(cases, 1)]
    for number, (given, arguments) in enumerate(zip(got, cases, strict=True), 1):
        if isinstance(given, _Failure):
            return given.sentence
        right = exercise.observe(exercise.reference, *copy.deepcopy(arguments))
        if not _equal(given, right, exercise.tolerance, same_kind=True):
            named = (message for message, wrong in exercise.wrong_functions() if _fits(exercise, wrong, got))
            return next(named, "") or _difference(exercise, number, given, right, arguments)
    return ""


def loss_and_gradient(function: Callable, values: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    """A learner's loss and its gradient by the first argument, for what observes a call.

    Raises:
        Told: what was returned is not a loss.
    """
    leaf = values.clone().requires_grad_()
    loss = function(leaf.clone(), *others)  # a clone may be changed in place, a leaf may not
    if isinstance(loss, float | int):
        raise Told("Your function returned a Python number: return a scalar tensor that still has its gradient.")
    if not isinstance(loss, Tensor):
        raise Told(f"Your function returned {_shown(loss)}: the loss is a scalar tensor.")
    if loss.numel() != 1:
        raise Told(f"Your function returned the shape {tuple(loss.shape)}: the loss is one number.")
    return loss.detach().reshape(()), gradient_of(loss, leaf)


def gradient_of(loss: Tensor, leaf: Tensor) -> Tensor:
    """Gradient of a learner's loss, zeros where none flows; the graph is kept for further losses.

    Raises:
        Told: it cannot be differentiated.
    """
    if not loss.requires_grad:
        return torch.zeros_like(leaf)
    try:
        (gradient,) = torch.autograd.grad(loss.sum(), leaf, retain_graph=True, allow_unused=True)
    except RuntimeError as error:  # the learner's function has not raised this, so it is not reported as if it had
        raise Told(f"Your loss cannot be differentiated: {str(error)[:300]}") from error
    return torch.zeros_like(leaf) if gradient is None else gradient


@dataclass(frozen=True)
class _Failure:
    """In place of the outcome of a call that gave none."""

    sentence: str


def _outcome(exercise: Exercise, function: Callable, number: int, arguments: tuple) -> object:
    def returning(*given: object, **options: object) -> object:
        result = function(*given, **options)
        if result is None:
            raise Told("Your function returned None: is a return missing?")
        return result

    try:
        return exercise.observe(returning, *copy.deepcopy(arguments))
    except Told as told:
        return _Failure(str(told))
    except Exception as error:  # whatever a learner's code raises is shown, not passed on
        if isinstance(error, NotImplementedError) and not error.args:  # as in the stub; torch raises it with a sentence
            return _Failure("Nothing here yet: put your own lines in place of the last one.")
        sentence = f"Case {number}: your function raised {type(error).__name__}: {str(error)[:300]}"
        return _Failure(_with_call(sentence.rstrip(".: "), arguments))


def _fits(exercise: Exercise, wrong: Callable, got: Sequence[object]) -> bool:
    """Whether a wrong function gives what a learner's function gave, in all cases in which that one did not fail."""
    for given, arguments in zip(got, exercise.cases(), strict=True):
        if isinstance(given, _Failure):
            continue
        try:
            same = _equal(given, exercise.observe(wrong, *copy.deepcopy(arguments)), exercise.tolerance)
        except Exception:  # a mistake may fail in a case, too
            same = False
        if not same:
            return False
    return True


def _equal(given: object, wanted: object, tolerance: float, same_kind: bool = False) -> bool:
    """Equal up to the tolerance. Only with ``same_kind`` are tensors of bools and of numbers two kinds."""
    if isinstance(wanted, tuple | list):
        return (
            isinstance(given, tuple | list)
            and len(given) == len(wanted)
            and all(_equal(a, b, tolerance, same_kind) for a, b in zip(given, wanted, strict=True))
        )
    if isinstance(wanted, Tensor):
        if not isinstance(given, Tensor) or given.shape != wanted.shape or (same_kind and _kinds_differ(given, wanted)):
            return False
        return bool(_close(given, wanted, tolerance).all())
    if isinstance(wanted, float | int) and not isinstance(wanted, bool):
        if isinstance(given, str):  # float would read the number in it
            return False
        try:
            number = float(given)  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError, OverflowError):
            return False
        if math.isnan(number) and math.isnan(wanted):
            return True
        return number == wanted or math.isclose(number, wanted, rel_tol=tolerance, abs_tol=tolerance)
    return type(given) is type(wanted) and given == wanted


def _close(given: Tensor, wanted: Tensor, tolerance: float) -> Tensor:
    return torch.isclose(given.double(), wanted.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def _kinds_differ(given: Tensor, wanted: Tensor) -> bool:
    return (given.dtype is torch.bool) != (wanted.dtype is torch.bool)


def _difference(exercise: Exercise, number: int, given: object, right: object, arguments: tuple) -> str:
    """Which part of a case differs and how, then what it was called with."""
    where, how = _part_that_differs(given, right, exercise.tolerance, exercise.parts)
    named = bool(exercise.parts and where)  # a part's own name says what it is
    head = ", ".join((f"Case {number}", *([exercise.observed] if exercise.observed and not named else []), *where))
    return _with_call(f"{head}: {how}", arguments)


def _part_that_differs(given: object, right: object, tolerance: float, names: Sequence[str]) -> tuple[list[str], str]:
    """Names of the first part that differs, from the outside in, and what was expected of it."""
    if isinstance(right, tuple | list):
        if not isinstance(given, tuple | list) or len(given) != len(right):
            return [], f"expected {_counted(len(right))}, but got {_amount(given)}"
        pairs = enumerate(zip(given, right, strict=True))
        place = next(n for n, (a, b) in pairs if not _equal(a, b, tolerance, same_kind=True))
        inner, how = _part_that_differs(given[place], right[place], tolerance, ())
        return [names[place] if names else f"part {place + 1}", *inner], how
    if isinstance(right, Tensor) and not isinstance(given, Tensor):
        return [], f"expected a tensor of shape {tuple(right.shape)}, but got {_shown(given)}"
    if isinstance(right, Tensor) and isinstance(given, Tensor):
        if given.shape != right.shape:
            return [], f"expected the shape {tuple(right.shape)}, but got {tuple(given.shape)}"
        if _kinds_differ(given, right):
            kinds = [str(tensor.dtype).removeprefix("torch.") for tensor in (right, given)]
            return [], "expected a tensor of {}, but got one of {}".format(*kinds)
        if _shown(right) == _shown(given):  # what differs is not among the numbers that are shown
            place = tuple((~_close(given, right, tolerance)).nonzero()[0].tolist())
            right, given, at = right[place].item(), given[place].item(), f" at {list(place)}" if place else ""
            return [], f"expected {_precise(right)}{at}, but got {_precise(given)}"
    if _shown(right) == _shown(given):
        return [], f"expected {_precise(right)}, but got {_precise(given)}"
    return [], f"expected {_shown(right)}, but got {_shown(given)}"


def _counted(results: int) -> str:
    count = _COUNTS[results] if results < len(_COUNTS) else str(results)
    return f"{count} result{'' if results == 1 else 's'}"


def _amount(given: object) -> str:
    if isinstance(given, tuple | list):
        return _counted(len(given)).partition(" ")[0]
    if isinstance(given, Tensor):
        return "one tensor"
    return "one number" if isinstance(given, float | int) else _shown(given)


def _with_call(sentence: str, arguments: tuple) -> str:
    """What is wrong, and after it what the function was called with: only that is cut where there is no room."""
    called = ", ".join(_shown(argument) for argument in arguments)
    return f"{sentence}. (Called with {_cut(called, LONGEST_MESSAGE - len(sentence) - len('. (Called with .)'))}.)"


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: max(longest - 1, 0)] + "…"


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
        text = repr(_rounded(value))
    return _cut(text, 120)


def _rounded(value: object) -> object:
    """Four places, or four digits of a small number; what is no float stays as it is."""
    if not isinstance(value, float):
        return value
    return round(float(value), 4) if abs(value) >= 0.1 or not value else float(f"{value:.4g}")


def _precise(value: object) -> str:
    """For numbers that look alike when they are rounded."""
    return repr(float(f"{value:.10g}")) if isinstance(value, float) else _shown(value)
