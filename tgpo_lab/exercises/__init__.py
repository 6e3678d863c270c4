"""Exercises of the notebooks, with checks that take the learner's own function.

    from tgpo_lab.exercises import check

    check("01.1", my_function)

One module for each notebook, named after it.
"""

from __future__ import annotations

from collections.abc import Callable

from ..errors import InputError
from . import (
    a_fair_comparison,
    a_task_a_teacher_a_student,
    grpo,
    is_the_teacher_right,
    on_policy_distillation,
    policies_and_tokens,
    tgpo,
    the_gradient_of_reverse_kl,
    to_a_real_pair,
    two_kls,
    when_reverse_kl_fails,
)
from .checking import CheckResult, Exercise, check_function

_MODULES = (
    policies_and_tokens,
    a_task_a_teacher_a_student,
    two_kls,
    the_gradient_of_reverse_kl,
    on_policy_distillation,
    when_reverse_kl_fails,
    grpo,
    tgpo,
    is_the_teacher_right,
    a_fair_comparison,
    to_a_real_pair,
)

EXERCISES: dict[str, Exercise] = {exercise.number: exercise for module in _MODULES for exercise in module.EXERCISES}
"""By number."""


def check(number: str, function: Callable) -> CheckResult:
    """Check a function that solves an exercise.

    Args:
        number: of the exercise, for instance ``"01.1"``.
        function: the learner's.

    Returns:
        What a notebook shows as a sentence; it does not raise for a wrong solution.

    Raises:
        InputError: there is no such exercise.
    """
    if number not in EXERCISES:
        raise InputError(f"There is no exercise {number!r}: there are {', '.join(EXERCISES)}.")
    return check_function(EXERCISES[number], function)
