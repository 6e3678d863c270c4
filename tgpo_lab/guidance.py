"""Where the teacher is asked: gates over the positions of a rollout, as pure tensor functions.

All take and give (B, T) tensors. A gate weighs guidance at each position by a number from 0 to 1, most of them by 0
or 1 alone. It looks only at the prefix of a position and at what the teacher says there, never at what comes later.

The trust horizon is for teachers that are lost on prefixes which they would not have written: it asks the teacher
only while the student's prefix is believable to it. With the surprise s_i = −log πT(y_i | x, y_<i) of a token, in nats,

    doubt before t     D_t = λ·D_{t−1} + s_{t−1}, D_0 = 0, which is Σ_{i<t} λ^(t−1−i)·s_i
                       or D_t = max(λ·D_{t−1}, s_{t−1}), which is max_{i<t} λ^(t−1−i)·s_i
    hard horizon       guidance counts where D_t ≤ τ
    soft horizon       guidance is weighted by exp(−D_t/τ)

λ is the memory of doubt, τ the threshold in nats. At a departure itself the teacher is still asked: the prefix up to
there is believable, and its answer is what the student should have written.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .teacher import TeacherAnswers

Gate = Literal["none", "confidence", "first_departure", "trust_horizon"]
Doubt = Literal["sum", "worst_token"]

_MOST_SURPRISE = 1e6  # nats; an infinite surprise would stay infinite however it faded, and 0·∞ is not a number


def confidence_gate(confidence: Tensor, probability: float) -> Tensor:
    """Where the teacher gives its best token more than ``probability``; bool. ``confidence`` is a log-probability."""
    return confidence > math.log(probability)


def first_departure_gate(tokens: Tensor, teacher_tokens: Tensor) -> Tensor:
    """Up to and including the first position at which the student wrote another token than the teacher's best; bool.

    The teacher's answer AT the departure still stands on a prefix that is its own.
    """
    same = tokens == teacher_tokens
    before = torch.ones_like(same)
    before[:, 1:] = same[:, :-1].long().cumprod(-1).bool()
    return before


def teacher_doubt(teacher_logprobs: Tensor, doubt: Doubt, memory: float) -> Tensor:
    """How little the teacher believes each prefix: D_t in nats, see the head of this file; (B, T) → (B, T).

    ``sum`` adds up the surprises of the prefix, ``worst_token`` keeps the largest. What memory λ means:

    - λ = 1 forgets nothing. The sum is then −log πT(y_<t | x), the teacher's surprise at the whole prefix. On a long
      response ordinary entropy adds up in it and ends the horizon although nothing improbable was written: at 0.3
      nats a token 8 nats are reached after 27 tokens. The worst token does not add up, but one slip ends it for good.
    - λ < 1 forgives: a departure fades with a half-life of ln ½/ln λ tokens, and one of S nats holds a horizon of τ
      nats shut for about ln(S/τ)/ln(1/λ) tokens. A steady surprise of h nats a token brings the sum to h/(1 − λ), so
      in the long run such a horizon bears τ·(1 − λ) nats a token.
    - λ = 0 looks at the last token alone.

    Args:
        teacher_logprobs: log πT of the tokens that stand in the rollout. Values at padding, which is on the right,
            do not reach a response.
        doubt: what it is made of.
        memory: λ, from 0 to 1.
    """
    surprise = (-teacher_logprobs).clamp(0, _MOST_SURPRISE)
    doubts = torch.zeros_like(surprise)
    doubts[:, 1:] = surprise[:, :-1]  # what the last token alone raises
    reach = 1
    # Doubts over the last `reach` tokens give those over twice as many: log₂ T steps in place of T. Powers of λ are
    # at most 1 and nothing is subtracted, so it can neither overflow nor cancel, as a cumulative sum over λ^−i would.
    while reach < doubts.shape[1]:
        faded = torch.zeros_like(doubts)
        faded[:, reach:] = memory**reach * doubts[:, :-reach]
        doubts = doubts + faded if doubt == "sum" else torch.maximum(doubts, faded)
        reach *= 2
    return doubts


def trust_horizon_gate(doubts: Tensor, threshold: float) -> Tensor:
    """Hard horizon: where the teacher's doubt D_t is at most τ = ``threshold``; bool.

    With the doubt of the worst token and λ = 1: up to and including the first token that the teacher gives less
    than e^−τ.
    """
    return doubts <= threshold


def trust_horizon_weights(doubts: Tensor, threshold: float) -> Tensor:
    """Soft horizon: exp(−D_t/τ) with τ = ``threshold``, from 1 at a prefix without surprise towards 0.

    With the sum and λ = 1 it is πT(y_<t | x)^(1/τ), the teacher's probability of the whole prefix, flattened.
    """
    return (-doubts / threshold).exp()


def apply_gate(
    gate: Gate,
    threshold: float,
    tokens: Tensor,
    answers: TeacherAnswers,
    *,
    doubt: Doubt = "worst_token",
    memory: float = 1.0,
    soft: bool = False,
) -> Tensor:
    """The gate by name: (B, T) weights from 0 to 1.

    Args:
        gate: its name.
        threshold: probability of the confidence gate, τ of the trust horizon; the others do not read it.
        tokens: (B, T) what the student wrote.
        answers: what the teacher says there.
        doubt, memory, soft: of the trust horizon alone.
    """
    if gate == "confidence":
        open_at = confidence_gate(answers.confidence, threshold)
    elif gate == "first_departure":
        open_at = first_departure_gate(tokens, answers.tokens)
    elif gate == "trust_horizon":
        doubts = teacher_doubt(answers.logprobs, doubt, memory)
        if soft:
            return trust_horizon_weights(doubts, threshold)
        open_at = trust_horizon_gate(doubts, threshold)
    else:
        open_at = torch.ones_like(tokens)
    return open_at.to(answers.logprobs.dtype)
