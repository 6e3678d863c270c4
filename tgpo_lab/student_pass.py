"""The student's forward pass in an update, with the vocabulary projected a few positions at a time.

Logits are by far the largest tensors of a step. Here they exist for one chunk of positions only: a
chunk's losses are differentiated down to its hidden states at once, and the hidden states' gradients
then go back through the layers together. That changes nothing but memory and rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator
from torch import Tensor

from .batch import Batch, Positions
from .methods.base import Term
from .micro_batches import split_rows
from .pairs import Pair
from .policy import positions_at_once, project_to_vocabulary, response_hidden_states
from .processes import Processes

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
        row, self._step = part.mask.nonzero(as_tuple=True)
        self._row = rows[row]
        with autocast():
            self._hidden = response_hidden_states(pair.student, part)  # (N, H)
        size = positions_at_once(pair.vocabulary_size, self._hidden.device)
        self._chunks = [chunk.requires_grad_(self._hidden.requires_grad) for chunk in self._hidden.detach().split(size)]

    def positions(self) -> Iterator[Positions]:
        """The positions chunk by chunk; a loss of a chunk is differentiated before the next is taken."""
        start = 0
        for hidden in [] if self._idle else self._chunks:
            end = start + len(hidden)
            with self._autocast():
                logits = project_to_vocabulary(self._pair.student, hidden, self._pair.vocabulary_size)
            if self._temperature != 1:
                logits = logits / self._temperature
            where = self._row[start:end], self._step[start:end]
            yield Positions(self._batch, where, logits, self._pair.teacher, self._pair.vocabulary_size)
            start = end

    def backward(self, accelerator: Accelerator) -> None:
        """Carry the gradients that the chunks have gathered through the student's layers."""
        if self._idle:
            # A parameter without a gradient would be left out of what the processes exchange: so it gets zeros.
            logits = project_to_vocabulary(self._pair.student, self._chunks[0], self._pair.vocabulary_size)
            accelerator.backward(logits, gradient=torch.zeros_like(logits))
        if all(chunk.grad is None for chunk in self._chunks):
            return
        gradients = [torch.zeros_like(chunk) if chunk.grad is None else chunk.grad for chunk in self._chunks]
        accelerator.backward(self._hidden, gradient=torch.cat(gradients))


def student_passes(
    batch: Batch,
    rows: Tensor,
    pair: Pair,
    temperature: float,
    autocast: Autocast,
    micro_batch_tokens: int,
    processes: Processes,
) -> Iterator[StudentPass]:
    """Forward passes that together hold the rows (N,) int64 once, in micro-batches; a process may have no rows.

    Where the student's weights are sharded, a pass needs all processes: those with fewer micro-batches than another
    make idle passes over one row at the end.
    """
    parts = split_rows(batch.rollouts.rows(rows), micro_batch_tokens)
    idle = processes.largest(len(parts)) - len(parts) if processes.sharded else 0  # asked before the first pass
    for part in parts:
        yield StudentPass(batch, rows.to(part.device)[part], pair, temperature, autocast)
    for _ in range(idle):
        one = torch.zeros(1, dtype=torch.long, device=batch.rollouts.mask.device)
        yield StudentPass(batch, one, pair, temperature, autocast, idle=True)


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
            if look is not None:
                look(positions)
        student_pass.backward(accelerator)
    return sums
