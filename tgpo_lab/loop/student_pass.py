"""The student's forward pass in an update, with the vocabulary projected a few positions at a time.

Logits are by far the largest tensors of a step. Here they exist for one chunk of positions only: a
chunk's losses are differentiated down to its hidden states at once, and the hidden states' gradients
then go back through the layers together. That changes nothing but memory and rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from ..batch import Batch, Positions
from ..methods.base import Term
from ..micro_batches import split_rows
from ..models.pairs import Pair
from ..models.policy import positions_at_once, project_to_vocabulary, response_hidden_states
from ..parallel.processes import Processes
from .out_of_memory import MicroBatchTokens

Autocast = Callable[[], AbstractContextManager]
"""Gives the context in which products are made: bfloat16 or not."""


class StudentPass:
    """One forward pass of the student over some rows of a batch; an ``idle`` one shows nothing and adds no gradient."""

    def __init__(
        self, batch: Batch, rows: Tensor, pair: Pair, temperature: float, autocast: Autocast, *, idle: bool = False
    ):
        self._idle = idle
        self._batch, self._pair, self._temperature, self._autocast = batch, pair, temperature, autocast
        part = batch.rollouts.rows(rows)
        row, step = part.mask.nonzero(as_tuple=True)
        self._places = rows[row] * batch.rollouts.mask.shape[1] + step
        with autocast():
            self._hidden = response_hidden_states(pair.student, part)  # (N, H)
        size = positions_at_once(pair.vocabulary_size, self._hidden.device)
        self._chunks = [chunk.requires_grad_(self._hidden.requires_grad) for chunk in self._hidden.detach().split(size)]
        self._gradient = None
        if self._hidden.requires_grad:
            # One tensor that is there before the first chunk. Small gradients made between a chunk's logits and the
            # next one's would lie in the room that the first left, and the next ones would find no place there.
            self._gradient = torch.zeros_like(self._hidden)
            for chunk, gradient in zip(self._chunks, self._gradient.split(size), strict=True):
                chunk.grad = gradient

    def positions(self) -> Iterator[Positions]:
        """The positions chunk by chunk; a loss of a chunk is differentiated before the next is taken."""
        start = 0
        for hidden in [] if self._idle else self._chunks:
            end = start + len(hidden)
            with self._autocast():
                logits = project_to_vocabulary(self._pair.student, hidden, self._pair.vocabulary_size)
            if self._temperature != 1:
                logits = logits / self._temperature
            places = self._places[start:end]
            yield Positions(self._batch, places, logits, self._pair.teacher, self._pair.vocabulary_size)
            start = end

    def backward(self, accelerator: Accelerator, *, any_loss: bool) -> None:
        """Carry the gradients that the chunks have gathered through the student's layers.

        Args:
            accelerator: does it.
            any_loss: whether a loss of any chunk was differentiated; if not, nothing is done, unless it is idle.
        """
        if self._idle:
            # A parameter without a gradient would be left out of what the processes exchange: so it gets zeros.
            logits = project_to_vocabulary(self._pair.student, self._chunks[0], self._pair.vocabulary_size)
            accelerator.backward(logits, gradient=torch.zeros_like(logits))
        if any_loss or self._idle:
            accelerator.backward(self._hidden, gradient=self._gradient)


def accumulate_gradients(
    passes: Iterable[StudentPass],
    terms: list[Term],
    accelerator: Accelerator,
    autocast: Autocast,
    look: Callable[[Positions], None] | None = None,
) -> dict[str, Tensor | float]:
    """Add the gradient of the weighted terms to the student's parameters.

    Args:
        passes: forward passes that together hold every row once.
        terms: terms of the method's loss; those of weight 0 are left out.
        accelerator: does the backward passes.
        autocast: context in which losses are computed.
        look: called with every chunk of positions, after its backward pass.

    Returns:
        The sum of each kind of term, not weighted: ``loss_reward``, ``loss_teacher``; and ``guided``
        of the term that has it.
    """
    counted = [term for term in terms if term.weight]
    sums: dict[str, Tensor | float] = {}
    for term in counted:
        if term.guided is not None:
            sums["guided"] = term.guided
    sums |= dict.fromkeys((f"loss_{term.kind}" for term in counted), 0.0)
    for student_pass in passes:
        any_loss = False
        for positions in student_pass.positions():
            total = positions.logits.new_zeros(())
            with autocast():
                for term in counted:
                    loss = term.loss(positions, positions.take(term.mask))
                    key = f"loss_{term.kind}"
                    sums[key] = sums[key] + loss.detach()  # no float(): a GPU would be waited for
                    total = total + term.weight * loss
            if total.requires_grad:
                accelerator.backward(total)
                any_loss = True
            if look is not None:
                look(positions)
        student_pass.backward(accelerator, any_loss=any_loss)
    return sums


class Look(Protocol):
    """What takes in the positions of a batch as they pass."""

    def restart(self) -> None:
        """Forget them: memory ran out, and they come again."""

    def add(self, positions: Positions) -> None:
        """Take in some."""


class StudentPasses:
    """All passes through the student in a run, in micro-batches that fit into memory; each process with its own rows.

    Where the student's weights are sharded, a pass needs all processes: those with fewer micro-batches than another
    make idle passes over one row at the end.
    """

    def __init__(
        self,
        pair: Pair,
        temperature: float,
        autocast: Autocast,
        accelerator: Accelerator,
        processes: Processes,
        limit: MicroBatchTokens,
    ):
        self._pair, self._temperature, self._autocast = pair, temperature, autocast
        self._accelerator, self._processes, self._limit = accelerator, processes, limit
        self._parameters = [p for p in pair.student.parameters() if p.requires_grad]

    def logprobs(self, batch: Batch, rows: Tensor, look: Look) -> Tensor:
        """log πθ without gradient: (B, T), zero but for the rows (N,) int64 of this process."""

        @torch.no_grad()
        def work(tokens: int) -> Tensor:
            look.restart()
            logprobs = torch.zeros(batch.rollouts.mask.shape, device=batch.rollouts.mask.device)
            for student_pass in self._passes(batch, rows, tokens):
                for positions in student_pass.positions():
                    positions.write_logprobs(logprobs)
                    look.add(positions)
            return logprobs

        return self._limit.fit(batch.rollouts.rows(rows), work)

    def gradients(self, batch: Batch, rows: Tensor, terms: list[Term], look: Look | None = None) -> dict[str, float]:
        """Give the student's parameters the gradient of the weighted terms, over the rows of all processes.

        Args:
            batch: the (mini-)batch that the terms are of.
            rows: (N,) int64 those of this process; there may be none.
            terms: terms of the method's loss.
            look: gets every chunk of positions.

        Returns:
            As :func:`accumulate_gradients`, of all processes.
        """

        def work(tokens: int) -> dict[str, Tensor | float]:
            for parameter in self._parameters:
                parameter.grad = None
            if look is not None:
                look.restart()
            passes = self._passes(batch, rows, tokens)
            return accumulate_gradients(passes, terms, self._accelerator, self._autocast, look and look.add)

        losses = self._limit.fit(batch.rollouts.rows(rows), work)
        self._processes.add_gradients(self._parameters)
        # What a gate lets through is known of the whole batch; losses are of this process's rows.
        return losses | self._processes.totals({name: x for name, x in losses.items() if name != "guided"})

    def _passes(self, batch: Batch, rows: Tensor, tokens: int) -> Iterator[StudentPass]:
        parts = split_rows(batch.rollouts.rows(rows), tokens)
        # Asked before the first pass: later the others would already be exchanging weights.
        idle = self._processes.largest(len(parts)) - len(parts) if self._processes.sharded else 0
        for part in parts:
            yield StudentPass(batch, rows.to(part.device)[part], self._pair, self._temperature, self._autocast)
        for _ in range(idle):
            one = torch.zeros(1, dtype=torch.long, device=batch.rollouts.mask.device)
            yield StudentPass(batch, one, self._pair, self._temperature, self._autocast, idle=True)
