"""Several processes on one run: who does which share of a step, and what they tell each other.

Prompts are divided in whole groups, each process samples, judges and asks the teacher about its share, and then all
of them know all rollouts, rewards and teacher's answers. So group advantages, gates and the number that a term is
divided by are those of the whole batch on every process, and random choices are drawn for the whole batch: nothing
depends on the number of processes but rounding. Only the passes through the student stay with the process that has
the rows, and their gradients are ADDED up, once for each update.

That sum is taken here and not by DistributedDataParallel. Its hooks expect one backward pass through the forward pass
of the whole model, and average; the loop calls the layers and the output matrix apart and goes back through them
several times. Within its no_sync it would send as many bytes, since the loop needs no gradient before the last pass.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InputError, RunError
from .sharding import wants_sharding

if TYPE_CHECKING:
    from accelerate import Accelerator

LONGEST_WAIT = timedelta(minutes=30)
"""For a process that does not answer. A step's slowest phase, or writing a checkpoint, has to fit into it."""


class OtherProcessError(RunError):
    """Another process of the run failed, ended or does not answer; the message says how to go on."""


class Processes:
    """The processes of a run, seen from one of them. Without an accelerator there is one alone.

    Methods that communicate must be called by all, in the same order.

    Raises:
        InputError: started in a way under which the loop does not work.
        OtherProcessError: from any method that communicates, where another process is gone.
    """

    def __init__(self, accelerator: Accelerator | None = None, to_go_on: str = ""):
        self.number = 1 if accelerator is None else accelerator.num_processes
        self.index = 0 if accelerator is None else accelerator.process_index
        self.device = torch.device("cpu") if accelerator is None else accelerator.device
        self._to_go_on = to_go_on
        self.sharded = self.number > 1 and wants_sharding()
        """The student's parameters are shared out: FSDP."""
        if accelerator is not None:
            _refuse_unknown(accelerator)

    @property
    def is_first(self) -> bool:
        """The one that writes files and shows progress."""
        return self.index == 0

    def share(self, count: int) -> range:
        """Which of ``count`` things this process has: as many as the others or one more, none if there are too few."""
        return range(count * self.index // self.number, count * (self.index + 1) // self.number)

    def divided(self, count: int, work: Callable[[Tensor], Tensor]) -> Tensor:
        """A number for each of ``count`` things: ``work`` gives those of its argument, (N,) int64; all get (count,)."""
        if self.number == 1:
            return work(torch.arange(count))
        share = torch.tensor(self.share(count), dtype=torch.long)
        values = torch.zeros(count, device=self.device)
        if len(share):
            values[share] = work(share).to(values)
        return self.sum(values)

    def sum(self, values: Tensor) -> Tensor:
        """Tensors of one shape added up, in place."""
        if self.number > 1:
            self._wait(lambda: dist.all_reduce(values))
        return values

    def add_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Give every parameter the sum of its gradients, and none where no process has one; under FSDP they have it."""
        if self.number == 1 or self.sharded:
            return
        having = self.sum(torch.tensor([int(p.grad is not None) for p in parameters], device=self.device))
        pending = []
        for parameter, anywhere in zip(parameters, having.tolist(), strict=True):
            if anywhere:
                if parameter.grad is None:  # this process had no rows
                    parameter.grad = torch.zeros_like(parameter)
                pending.append(self._wait(lambda gradient=parameter.grad: dist.all_reduce(gradient, async_op=True)))
        for work in pending:
            self._wait(work.wait)

    def totals(self, values: dict[str, float]) -> dict[str, float]:
        """Numbers by name, each added up."""
        if self.number == 1:
            return values
        summed = self.sum(torch.tensor([float(v) for v in values.values()], dtype=torch.float64, device=self.device))
        return dict(zip(values, summed.tolist(), strict=True))

    def largest(self, value: int) -> int:
        """The largest of the processes' values."""
        if self.number == 1:
            return value
        found = torch.tensor(value, device=self.device)
        self._wait(lambda: dist.all_reduce(found, dist.ReduceOp.MAX))
        return int(found)

    def any(self, value: bool) -> bool:
        """Whether it is so for any of them."""
        return bool(self.largest(int(value)))

    def first_alone(self, action: Callable[..., object], *arguments: object, **options: object) -> None:
        """Let the first process do something while the others wait; where it fails, all stop."""
        error = None
        if self.is_first:
            try:
                action(*arguments, **options)
            except Exception as caught:
                error = caught
        if self.any(error is not None):
            raise error or OtherProcessError(f"The first process has stopped; it says why. {self._to_go_on}")

    @contextmanager
    def loss_told(self) -> Iterator[None]:
        """Context of code that communicates on its own, as FSDP and vLLM do: there, too, a loss is one sentence.

        Raises:
            OtherProcessError: another process is gone.
        """
        try:
            yield
        except RunError:
            raise
        except RuntimeError as error:
            if self.number == 1 or not is_lost_connection(error):
                raise
            raise self._lost(error) from error

    def _wait(self, communicate: Callable[[], object]) -> object:
        try:
            return communicate()
        except RuntimeError as error:  # of gloo and NCCL alike
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> OtherProcessError:
        reason = f" ({told})" if (told := _first_sentence(str(error))) else ""
        return OtherProcessError(
            f"Another of the {self.number} processes has ended or does not answer{reason}. {self._to_go_on}"
        )


ALONE = Processes()
"""One process."""


def start_options() -> dict[str, object]:
    """Arguments of an ``Accelerator`` under which processes started by accelerate or torchrun find each other.

    Raises:
        InputError: they were started with a form of FSDP that the loop does not know, or cannot find each other.
    """
    from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

    if _started() > 1:
        if "MASTER_ADDR" not in os.environ:
            raise InputError(
                f"WORLD_SIZE says that {_started()} processes were started, but MASTER_ADDR does not say where they "
                "meet. Start them with accelerate launch or torchrun, or unset WORLD_SIZE for one process."
            )
        wants_sharding()  # before they join: of two that refuse, one may be gone while the other still looks for it
    return {
        # Without this, processes that torchrun starts on a machine without accelerators stay strangers.
        "cpu": _started() > 1 and not torch.accelerator.is_available(),
        "kwargs_handlers": [InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
        # The loop splits a batch itself; a number from accelerate's configuration would divide its gradients.
        "gradient_accumulation_plugin": GradientAccumulationPlugin(num_steps=1),
    }


def _started() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _refuse_unknown(accelerator: Accelerator) -> None:
    kind = accelerator.distributed_type.value
    if accelerator.num_processes == 1 and _started() > 1:
        raise InputError(
            f"{_started()} processes were started, but accelerate has not joined them ({kind}). Start them with "
            "accelerate launch or torchrun."
        )
    if kind not in ("NO", "FSDP") and not kind.startswith("MULTI_"):
        raise InputError(
            f"The loop cannot work under {kind}. Start it with accelerate launch --multi_gpu, with accelerate launch "
            "--use_fsdp --fsdp_version 2, or with torchrun."
        )


def _first_sentence(text: str) -> str:
    """What a communication library says first, without the place in its source and the advice that follows."""
    said = re.sub(r"^\[\S*/\S*:\d+\]\s*", "", text.strip()).split("\n")[0]
    return textwrap.shorten(re.split(r"\.(?:\s|$)", said)[0], 120, placeholder=" …")


def is_lost_connection(error: RuntimeError) -> bool:
    """Of NCCL and of the store where processes meet it is an error of its own type, of gloo a text alone."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)
