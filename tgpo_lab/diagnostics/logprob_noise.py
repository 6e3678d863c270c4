"""How far apart the ways are on which one model's log-probabilities are computed.

Sampling reads one token after the other with a cache; the update reads a whole sequence at once; the teacher's pass
does the same in the teacher's precision. In exact arithmetic all three agree. What is left is rounding: between
sampling and update it makes a run's tokens off policy (:mod:`tgpo_lab.importance`), between update and teacher's pass
it is the floor under every d_t.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..losses import token_logprobs
from ..micro_batches import split_rows
from ..models.pairs import Pair
from ..models.policy import positions_at_once, project_to_vocabulary, response_hidden_states
from ..rollouts import Rollouts
from ..teacher import ask_teacher


@dataclass(frozen=True)
class LogprobNoise:
    """Differences |Δ log πθ(y_t)| in nats over the tokens of some rollouts."""

    mean: float
    largest: float


@torch.no_grad()
def sampling_noise(
    pair: Pair,
    rollouts: Rollouts,
    temperature: float,
    autocast: Callable[[], AbstractContextManager],
    micro_batch_tokens: int,
) -> LogprobNoise:
    """The log-probabilities under which an engine drew, against those of the update.

    Args:
        pair: its student is asked.
        rollouts: B responses of the student, with the engine's log-probabilities.
        temperature: at which they were drawn.
        autocast: the context of an update's products, bfloat16 or not.
        micro_batch_tokens: at most so many tokens go through the model at once.
    """
    with autocast():
        updated = response_logprobs(pair.student, rollouts, temperature, pair.vocabulary_size, micro_batch_tokens)
    return _noise(rollouts.logprobs, updated, rollouts.mask)


@torch.no_grad()
def self_distillation_noise(
    pair: Pair,
    model: PreTrainedModel,
    rollouts: Rollouts,
    autocast: Callable[[], AbstractContextManager],
    micro_batch_tokens: int,
) -> LogprobNoise:
    """A model as its own teacher: d_t = log πθ(y_t) − log πT(y_t), the update path against the teacher's pass.

    Args:
        pair: brings the number of tokens that both models share.
        model: takes both parts.
        rollouts: B responses.
        autocast: the context of an update's products, bfloat16 or not.
        micro_batch_tokens: at most so many tokens go through the model at once.
    """
    asked = ask_teacher(
        model, rollouts, vocabulary_size=pair.vocabulary_size, micro_batch_tokens=micro_batch_tokens
    ).logprobs
    with autocast():
        updated = response_logprobs(model, rollouts, 1.0, pair.vocabulary_size, micro_batch_tokens)
    return _noise(asked, updated, rollouts.mask)


def _noise(one: Tensor, two: Tensor, mask: Tensor) -> LogprobNoise:
    difference = (one - two)[mask].abs()
    return LogprobNoise(float(difference.mean()), float(difference.max()))


def response_logprobs(
    model: PreTrainedModel, rollouts: Rollouts, temperature: float, vocabulary_size: int, micro_batch_tokens: int
) -> Tensor:
    """(B, T) log πθ of the response tokens, zero at padding."""
    logprobs = torch.zeros(rollouts.mask.shape, device=rollouts.responses.device)
    for rows in split_rows(rollouts, micro_batch_tokens):
        part = rollouts.rows(rows)
        states = response_hidden_states(model, part)  # (N, H)
        size = positions_at_once(vocabulary_size, states.device)
        row, step = part.mask.nonzero(as_tuple=True)
        for hidden, r, t in zip(states.split(size), row.split(size), step.split(size), strict=True):
            logits = project_to_vocabulary(model, hidden, vocabulary_size)  # (positions at once, V)
            logprobs[rows[r], t] = token_logprobs(logits / temperature, part.responses[r, t])
    return logprobs
