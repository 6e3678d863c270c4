"""Schedules of a weight over training steps, as small objects that a configuration can hold.

A schedule is called with the step number (0 is the first update) and gives the weight. It is
written, in configuration files and on the command line, as it is in Python: ``LinearDecay(0.02, 0.0002)``.
"""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass, field, fields

from .errors import InputError


@dataclass
class Schedule:
    """Base of all schedules."""

    def __call__(self, step: int) -> float:
        """Weight at ``step``."""
        raise NotImplementedError

    def observe(self, step: int, agreement: float) -> None:
        """Take note of the top-1 agreement measured at ``step``. Only schedules that react to it do anything."""

    def state(self) -> dict:
        """What a checkpoint has to keep."""
        return {}

    def load_state(self, state: dict) -> None:
        """Take back what :meth:`state` gave."""

    def __str__(self) -> str:
        options = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.init)
        return f"{type(self).__name__}({options})"

    def _require_not_negative(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(
                    f"{type(self).__name__}: {name} must be a finite number, 0 or more, but is {getattr(self, name)}: "
                    "a negative weight would push the student away from the teacher."
                )


@dataclass
class Constant(Schedule):
    """The same weight at every step."""

    value: float

    def __post_init__(self) -> None:
        self._require_not_negative("value")

    def __call__(self, step: int) -> float:
        return self.value


@dataclass
class LinearDecay(Schedule):
    """max(initial − rate·step, floor). The paper's: ``LinearDecay(2e-3, 1e-5)``, zero from step 200 on."""

    initial: float
    rate: float
    floor: float = 0.0

    def __post_init__(self) -> None:
        self._require_not_negative("initial", "rate", "floor")

    def __call__(self, step: int) -> float:
        # Rounding first: 2e-3 − 1e-5·200 is 2.6e-19 in binary, and a weight of 2.6e-19 is not zero.
        return max(round(self.initial - self.rate * step, 15), self.floor)


@dataclass
class Trapezoid(Schedule):
    """``value`` until ``hold_until``, then in a straight line to ``floor`` at ``end``."""

    value: float
    hold_until: int
    end: int
    floor: float = 0.0

    def __post_init__(self) -> None:
        self._require_not_negative("value", "hold_until", "floor")
        if self.end <= self.hold_until:
            raise InputError(f"Trapezoid: end ({self.end}) must come after hold_until ({self.hold_until}).")

    def __call__(self, step: int) -> float:
        if step <= self.hold_until:
            return self.value
        if step >= self.end:
            return self.floor
        return self.value + (self.floor - self.value) * (step - self.hold_until) / (self.end - self.hold_until)


@dataclass
class UntilAgreement(Schedule):
    """``value`` until student and teacher agree, then in a straight line to zero over ``ramp`` steps.

    Agreement is the share of student positions at which both have the same most probable token;
    it has to reach ``agreement`` at ``patience`` steps in a row. So guidance ends with its work
    done and not at a clock step.
    """

    value: float
    agreement: float = 0.95
    patience: int = 3
    ramp: int = 10
    _streak: int = field(default=0, init=False, repr=False)
    _reached_at: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self._require_not_negative("value", "ramp")
        if not 0 < self.agreement <= 1:
            raise InputError(f"UntilAgreement: agreement must be in (0, 1], but is {self.agreement}.")
        if self.patience < 1:
            raise InputError(f"UntilAgreement: patience must be 1 or more steps, but is {self.patience}.")

    def __call__(self, step: int) -> float:
        if self._reached_at is None or step <= self._reached_at:
            return self.value
        return self.value * max(0.0, 1 - (step - self._reached_at) / max(1, self.ramp))

    def observe(self, step: int, agreement: float) -> None:
        if self._reached_at is None:
            self._streak = self._streak + 1 if agreement >= self.agreement else 0
            if self._streak >= self.patience:
                self._reached_at = step

    def state(self) -> dict:
        return {"streak": self._streak, "reached_at": self._reached_at}

    def load_state(self, state: dict) -> None:
        self._streak, self._reached_at = state["streak"], state["reached_at"]


SCHEDULES: dict[str, type[Schedule]] = {s.__name__: s for s in (Constant, LinearDecay, Trapezoid, UntilAgreement)}


def parse_schedule(text: str) -> Schedule:
    """Read a schedule from text such as ``"LinearDecay(0.02, rate=0.0002)"``; a bare number is constant.

    The text is taken apart, never evaluated: names of schedules and numbers are all it may hold.

    Raises:
        InputError: the text is not a schedule.
    """
    expected = (
        f"Expected a number or one of {', '.join(f'{name}(…)' for name in SCHEDULES)} with numbers in the brackets, "
        'for example "LinearDecay(0.02, 0.0002)".'
    )
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call):
            return Constant(_number(call))
        schedule = SCHEDULES[call.func.id]  # type: ignore[attr-defined]
        options = {keyword.arg: _number(keyword.value) for keyword in call.keywords}
        return schedule(*(_number(argument) for argument in call.args), **options)
    except (SyntaxError, KeyError, AttributeError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"{text!r} is not a schedule. {expected}") from error


def _number(node: ast.expr) -> int | float:
    value = ast.literal_eval(node)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return value
