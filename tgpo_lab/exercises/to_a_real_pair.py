"""Exercises of notebook 12."""

from __future__ import annotations

from collections.abc import Callable

from .checking import Exercise

BYTES_PER_STUDENT_PARAMETER = 16  # weights, gradient and AdamW's two moments in float32
BYTES_PER_TEACHER_PARAMETER = 2  # bfloat16


def _memory(student_bytes: float, teacher_bytes: float, logit_bytes: float, unit: float = 2**30) -> Callable:
    def gibibytes(student_parameters: float, teacher_parameters: float, positions: int, vocabulary: int) -> float:
        total = student_bytes * student_parameters + teacher_bytes * teacher_parameters
        return (total + logit_bytes * positions * vocabulary) / unit

    return gibibytes


_right = _memory(BYTES_PER_STUDENT_PARAMETER, BYTES_PER_TEACHER_PARAMETER, 4)

EXERCISES = (
    Exercise(
        "12.1",
        "will it fit?",
        _right,
        lambda: [(1.5e9, 4e9, 8 * 4096, 151_936), (7e9, 30e9, 4096, 151_936)],
        {
            "This is in GB (10⁹ bytes); a GiB is 2³⁰ bytes.": _memory(16, 2, 4, 1e9),
            "AdamW is missing: it keeps two float32 numbers for each of the student's parameters.": _memory(8, 2, 4),
            "The gradient is missing: 4 bytes for each of the student's parameters.": _memory(12, 2, 4),
            "The teacher is not trained: it needs its bfloat16 weights alone, 2 bytes each.": _memory(16, 16, 4),
            "The teacher's weights are bfloat16, 2 bytes each, not 4.": _memory(16, 4, 4),
            "The logits are float32, 4 bytes each, not 2.": _memory(16, 2, 2),
        },
    ),
)
