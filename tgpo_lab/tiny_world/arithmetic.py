"""The task of the tiny world: sums of small numbers, answered in one of two styles.

*Terse* style answers at once (8 tokens for two-digit sums); *worked* style thinks column by column
with carries (about 50 tokens):

    47+85+36=  the sum is #168
    47+85+36= <think> ones 7+5=12+6=18 write 8 carry 1; tens 4+8=12+3=15+1=16 write 16;</think> #168

The answer of a response is what stands after its last ``#`` (see :mod:`tgpo_lab.tasks.rewards`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

COLUMN_NAMES = ("ones", "tens", "hundreds", "thousands", "tenthousands", "hundredthousands", "millions")
THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
ANSWER_MARK = "#"

# Share of all problems, by hash, that belongs to each split. Training of the shipped checkpoints
# draws from "train" alone, so validation and test prompts are new to student and teacher.
SPLIT_SHARES = {"train": 0.90, "validation": 0.05, "test": 0.05}


@dataclass(frozen=True)
class AdditionTask:
    """A family of sums: how many operands, of how many digits each (no leading zero)."""

    operands: int = 3
    digits: int = 2

    def __post_init__(self) -> None:
        if self.operands < 2:
            raise ValueError(f"An addition task needs at least 2 operands, but operands={self.operands}.")
        if not 1 <= self.digits < len(COLUMN_NAMES):
            raise ValueError(f"digits must be from 1 to {len(COLUMN_NAMES) - 1}, but digits={self.digits}.")

    @property
    def name(self) -> str:
        """Operands × digits, as folders are named: ``3x2``."""
        return f"{self.operands}x{self.digits}"

    def draw(self, random: np.random.Generator, split: str) -> tuple[int, ...]:
        """Draw one problem of ``split`` (rejection sampling on :func:`split_of`)."""
        low, high = 10 ** (self.digits - 1), 10**self.digits
        while True:
            problem = tuple(int(x) for x in random.integers(low, high, size=self.operands))
            if split_of(problem) == split:
                return problem

    def distinct(self, random: np.random.Generator, split: str) -> Iterator[tuple[int, ...]]:
        """Endless stream of problems of ``split`` without repetition, up to the order of operands."""
        seen: set[tuple[int, ...]] = set()
        while True:
            problem = self.draw(random, split)
            key = tuple(sorted(problem))
            if key not in seen:
                seen.add(key)
                yield problem


def split_of(problem: tuple[int, ...]) -> str:
    """Name of the split a problem belongs to.

    Decided by a hash of the sorted operands: 47+85 and 85+47 are never in different splits.
    """
    key = "+".join(str(x) for x in sorted(problem)).encode()
    position = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64
    for name, share in SPLIT_SHARES.items():
        if position < share:
            return name
        position -= share
    return "test"  # rounding at the upper end


def prompt_text(problem: tuple[int, ...]) -> str:
    """``(47, 85)`` → ``"47+85="``."""
    return "+".join(str(x) for x in problem) + "="


def terse_text(answer: int) -> str:
    """Response in terse style, stating ``answer`` (right or wrong)."""
    return f" the sum is {ANSWER_MARK}{answer}"


def worked_text(problem: tuple[int, ...]) -> str:
    """Response in worked style: one column after the other, with carries, then the right answer."""
    width = max(len(str(x)) for x in problem)
    columns = []
    carry = 0
    for place in range(width):
        column = [x // 10**place % 10 for x in problem]
        last = place == width - 1
        running = column[0]
        steps = [str(running)]
        for addend in column[1:] + ([carry] if place else []):
            running += addend
            steps.append(f"+{addend}={running}")
        carry = running // 10
        written = f" write {running}" if last else f" write {running % 10} carry {carry}"
        columns.append(f" {COLUMN_NAMES[place]} {''.join(steps)}{written};")
    return f"{THINK_OPEN}{''.join(columns)}{THINK_CLOSE} {ANSWER_MARK}{sum(problem)}"
