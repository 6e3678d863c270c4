"""Verifiable rewards: 1.0 for a right answer, 0.0 otherwise. Text is compared, never evaluated."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from decimal import Decimal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from ..parallel.processes import ALONE, Processes
from ..rollouts import Rollouts
from .imported_reward import ImportedReward
from .math_answers import math_verify, require_math_verify

ANSWER_MARK = "#"
# ASCII digits alone: "\d" would take digits of every script. The length bound keeps odd input cheap.
PLAIN_INTEGER = re.compile(r"-?[0-9]{1,64}")
# 42, -7, 3.50, 1,234,567. A minus after a digit, a letter or a bracket is a subtraction.
NUMBER = re.compile(r"(?:(?<![\w)\]])[-−])?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?", re.ASCII)
# Between thousands: 1{,}234 and 1\,234, as LaTeX sets them.
LATEX_COMMA = re.compile(r"(?<=[0-9])(?:\{,\}|,?\\[,!])(?=[0-9]{3})")


def marked_answer(response: str, answer: str) -> float:
    """1.0 if the response ends in ``#`` and the answer.

    What stands after the LAST ``#`` counts, up to the end of the response: it must be one plain
    integer, spaces around it allowed, with the same digits as ``answer``. So a response that names
    several answers has named the last one, and one that goes on talking has named none.
    """
    _, mark, said = response.rpartition(ANSWER_MARK)
    said = said.strip(" \n")
    return float(bool(mark) and PLAIN_INTEGER.fullmatch(said) is not None and said == answer)


def exact_match(response: str, answer: str) -> float:
    """1.0 if the whole response is the answer, apart from white space around it."""
    return float(response.strip() == answer.strip())


def last_number(response: str, answer: str) -> float:
    """1.0 if the last number of the response has the value of the answer's last number: 1,234.50 is 1234.5.

    Numbers are decimal, with or without commas between thousands, LaTeX's among them. It fits datasets such as
    openai/gsm8k and responses that end in any words.

    Raises:
        InputError: the answer has no number.
    """
    expected, said = _last(answer), _last(response)
    if expected is None:
        raise InputError(
            f"The reward last_number compares numbers, but the right answer {answer[-200:]!r} has none. Choose another "
            "reward, or name the column with the answers."
        )
    return float(said == expected)


def _last(text: str) -> Decimal | None:
    numbers = NUMBER.findall(LATEX_COMMA.sub(",", text))
    return Decimal(numbers[-1].replace(",", "").replace("−", "-")) if numbers else None


REWARDS: dict[str, Callable[[str, str], float]] = {
    "marked_answer": marked_answer,
    "exact_match": exact_match,
    "last_number": last_number,
    "math_verify": math_verify,
}


def reward_function(name: str) -> Callable[[str, str], float]:
    """Reward by name, or a function of one's own by its import path ``package.module:function``.

    Raises:
        InputError: unknown name, a package that is not installed, or a function that cannot be imported.
    """
    if ":" in name:
        return ImportedReward(name)
    if name not in REWARDS:
        raise InputError(
            f"Unknown reward {name!r}: choose one of {', '.join(sorted(REWARDS))}, or package.module:function."
        )
    if name == "math_verify":
        require_math_verify()
    return REWARDS[name]


def require_readable_answers(reward: str, answers: Iterable[str]) -> None:
    """Refuse right answers with which a reward could not compare any response.

    Args:
        reward: by name.
        answers: of all prompts. A run would otherwise meet a bad one in some later step.

    Raises:
        InputError: last_number is to compare with an answer that has no number.
    """
    if reward == "last_number":
        for answer in answers:
            last_number("", answer)


def score(
    rollouts: Rollouts,
    answers: list[str],
    reward: Callable[[str, str], float],
    tokenizer: PreTrainedTokenizerBase,
    *,
    processes: Processes = ALONE,
) -> Tensor:
    """Rewards of rollouts: (B,) float32 on the CPU. ``answers`` has one entry per row.

    A response that was cut at the token limit gets 0: it has not given its answer yet. Each process judges a share of
    the rows; all get the rewards of all.
    """
    right = dict(zip(range(len(rollouts)), answers, strict=True))

    def judge(rows: Tensor) -> Tensor:
        own = rollouts.rows(rows)
        scores = [
            reward(text, right[row]) if finished else 0.0
            for row, text, finished in zip(rows.tolist(), own.texts(tokenizer), own.finished.tolist(), strict=True)
        ]
        return torch.tensor(scores, dtype=torch.float32)

    return processes.divided(len(rollouts), judge).cpu()
