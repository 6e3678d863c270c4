"""Verifiable rewards: 1.0 for a right answer, 0.0 otherwise. Text is compared, never evaluated."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .errors import InputError
from .rollouts import Rollouts

ANSWER_MARK = "#"
# ASCII digits alone: "\d" would take digits of every script. The length bound keeps odd input cheap.
PLAIN_INTEGER = re.compile(r"-?[0-9]{1,64}")


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


REWARDS: dict[str, Callable[[str, str], float]] = {"marked_answer": marked_answer, "exact_match": exact_match}


def reward_function(name: str) -> Callable[[str, str], float]:
    """Reward by name.

    Raises:
        InputError: unknown name.
    """
    if name not in REWARDS:
        raise InputError(f"Unknown reward {name!r}: choose one of {', '.join(sorted(REWARDS))}.")
    return REWARDS[name]


def score(
    rollouts: Rollouts,
    answers: list[str],
    reward: Callable[[str, str], float],
    tokenizer: PreTrainedTokenizerBase,
) -> Tensor:
    """Rewards of rollouts: (B,) float32 on the CPU. ``answers`` has one entry per row.

    A response that was cut at the token limit gets 0: it has not given its answer yet.
    """
    scores = [
        reward(text, answer) if finished else 0.0
        for text, answer, finished in zip(rollouts.texts(tokenizer), answers, rollouts.finished.tolist(), strict=True)
    ]
    return torch.tensor(scores, dtype=torch.float32)
