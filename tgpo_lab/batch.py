"""A batch of one training step, and the view of it that losses get."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .importance import truncated_importance_weights
from .losses import token_logprobs
from .models.policy import project_to_vocabulary
from .rollouts import Rollouts
from .teacher import TeacherAnswers


@dataclass(frozen=True)
class Batch:
    """Everything known about a step's rollouts before the update.

    The student's rows come first, groups of G together; rows that the teacher wrote, if the method
    asked for any, come after them in the same order of prompts.
    """

    rollouts: Rollouts
    from_teacher: Tensor
    """(B,) bool: the teacher wrote this row."""
    rewards: Tensor
    """(B,) verifiable reward."""
    teacher: TeacherAnswers
    """The teacher's answers at the prefixes of the student's rows (zeros on its own rows)."""
    behaviour_logprobs: Tensor | None
    """(B, T) log π_old; None when the batch is used for one update only, where it is log πθ itself."""
    group_size: int
    max_new_tokens: int
    random: torch.Generator
    """CPU generator for choices that a method makes."""
    importance_cap: float | None = None
    """Largest importance weight of a token; None for no weights."""
    teacher_states_only: bool = False
    """The teacher's answers about single tokens are not there before a loss has asked for its logits."""

    @property
    def student_mask(self) -> Tensor:
        """(B, T) bool: tokens that the student wrote."""
        return self.rollouts.mask & ~self.from_teacher.unsqueeze(-1)

    @property
    def teacher_mask(self) -> Tensor:
        """(B, T) bool: tokens that the teacher wrote."""
        return self.rollouts.mask & self.from_teacher.unsqueeze(-1)

    @property
    def student_rows(self) -> int:
        """Number of rows that the student wrote."""
        return int((~self.from_teacher).sum())

    def restricted_to(self, rows: Tensor) -> Batch:
        """The same tensors with only ``rows`` (int64) unmasked: a mini-batch, without moving a tensor."""
        chosen = torch.zeros(len(self.rollouts), dtype=torch.bool, device=rows.device)
        chosen[rows] = True
        return replace(self, rollouts=replace(self.rollouts, mask=self.rollouts.mask & chosen.unsqueeze(-1)))

    def with_behaviour(self, logprobs: Tensor) -> Batch:
        """The same with log π_old (B, T), for more than one update."""
        return replace(self, behaviour_logprobs=logprobs)


class Positions:
    """N unmasked positions of a batch as (1, N) tensors, the form in which losses take them."""

    def __init__(
        self,
        batch: Batch,
        places: Tensor,
        logits: Tensor,
        teacher: PreTrainedModel,
        vocabulary_size: int,
    ):
        """Take positions of a batch.

        Args:
            batch: the batch they are of.
            places: (N,) int64, place of each position in a (B, T) tensor: row × T + step.
            logits: (N, V) student logits, already divided by the temperature.
            teacher: for :meth:`teacher_logits`.
            vocabulary_size: V.
        """
        self.batch, self._places, self._teacher, self._vocabulary_size = batch, places, teacher, vocabulary_size
        self.logits = logits.unsqueeze(0)
        """(1, N, V) student logits, with gradient; the policy is their softmax."""
        self.tokens = self.take(batch.rollouts.responses)
        """(1, N) tokens of the rollouts."""

    @property
    def logprobs(self) -> Tensor:
        """(1, N) log πθ of the tokens of the rollouts, with gradient."""
        return self._logprobs_of_both[0]

    @property
    def teacher_token_logprobs(self) -> Tensor:
        """(1, N) log πθ of the teacher's most probable tokens, with gradient."""
        return self._logprobs_of_both[1]

    @cached_property
    def _logprobs_of_both(self) -> tuple[Tensor, ...]:
        # Both at once, as the softmax over the vocabulary and its gradient cost most; a loss over whole distributions
        # asks for neither.
        asked_about = torch.stack([self.tokens, self.take(self.batch.teacher.tokens)], -1)
        return token_logprobs(self.logits, asked_about).unbind(-1)

    def take(self, values: Tensor) -> Tensor:
        """Values of these positions: (B, T, …) → (1, N, …)."""
        return values.flatten(0, 1).index_select(0, self._places).unsqueeze(0)

    def write_logprobs(self, target: Tensor) -> None:
        """Put log πθ of these positions into ``target`` (B, T), which is contiguous."""
        target.view(-1).index_copy_(0, self._places, self.logprobs.detach().squeeze(0))

    @property
    def behaviour_logprobs(self) -> Tensor:
        """(1, N) log π_old."""
        known = self.batch.behaviour_logprobs
        return self.logprobs.detach() if known is None else self.take(known)

    @property
    def importance_weights(self) -> Tensor | None:
        """(1, N) :func:`tgpo_lab.importance.truncated_importance_weights`, if the batch is to have them."""
        cap, drawn_under = self.batch.importance_cap, self.batch.rollouts.logprobs
        if cap is None or drawn_under is None:
            return None
        return truncated_importance_weights(self.behaviour_logprobs, self.take(drawn_under), cap)

    def teacher_logits(self, where: Tensor | None = None) -> Tensor:
        """(1, N, V) teacher logits, or only those of the positions ``where`` (N,) bool.

        Where the batch has the teacher's states only, all logits bring the answers about single tokens with them.
        """
        index = self.take(self.batch.teacher.hidden_index).squeeze(0)
        index = index if where is None else index[where]
        states = self.batch.teacher.hidden  # where the teacher is, which may be another device
        with torch.no_grad():
            logits = project_to_vocabulary(self._teacher, states[index.to(states.device)], self._vocabulary_size)
            logits = logits.to(self.logits.device)
            if self.batch.teacher_states_only and where is None:
                responses = self.batch.rollouts.responses
                row, step = self._places // responses.shape[1], self._places % responses.shape[1]
                self.batch.teacher.write_single_tokens(logits, row, step, responses)
        return logits.unsqueeze(0)
