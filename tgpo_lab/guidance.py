"""Where the teacher is asked: gates over the positions of a rollout, as pure tensor functions.

All take and give (B, T) tensors; a gate is True where guidance counts. A gate looks only at the
prefix of a position and at what the teacher says there, never at what comes later.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .teacher import TeacherAnswers

Gate = Literal["none", "confidence", "first_departure", "trust_horizon"]


def confidence_gate(confidence: Tensor, probability: float) -> Tensor:
    """Where the teacher gives its best token more than ``probability``. ``confidence`` is a log-probability."""
    return confidence > math.log(probability)


def first_departure_gate(tokens: Tensor, teacher_tokens: Tensor) -> Tensor:
    """Up to and including the first position at which the student wrote another token than the teacher's best.

    The teacher's answer AT the departure still stands on a prefix that is its own.
    """
    return _all_before(tokens == teacher_tokens)


def trust_horizon_gate(teacher_logprobs: Tensor, threshold: float) -> Tensor:
    """Up to and including the first sampled token that the teacher gives less than e^−threshold.

    The teacher is asked only while the student's prefix is believable to it.
    """
    return _all_before(teacher_logprobs >= -threshold)


def apply_gate(gate: Gate, threshold: float, tokens: Tensor, answers: TeacherAnswers) -> Tensor:
    """The gate by name: (B, T) bool."""
    if gate == "confidence":
        return confidence_gate(answers.confidence, threshold)
    if gate == "first_departure":
        return first_departure_gate(tokens, answers.tokens)
    if gate == "trust_horizon":
        return trust_horizon_gate(answers.logprobs, threshold)
    return torch.ones_like(tokens, dtype=torch.bool)


def _all_before(holds: Tensor) -> Tensor:
    """True at t where ``holds`` is True at every position before t: (B, T) → (B, T)."""
    before = torch.ones_like(holds)
    before[:, 1:] = holds[:, :-1].long().cumprod(-1).bool()
    return before
