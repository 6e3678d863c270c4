"""Stopping a long run between two steps, and stopping it where it cannot go on: numbers, memory, disk."""

from __future__ import annotations

import errno
import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from ..allocation_errors import is_out_of_memory
from ..batch import Batch
from ..checkpoints import checkpoint_folders
from ..config import TrainConfig
from ..errors import RunError
from ..files import write_json, written_folder
from ..parallel.processes import Processes
from ..runs import CHECKPOINTS, latest_checkpoint
from .out_of_memory import elsewhere


class NonFiniteError(RunError):
    """A loss or gradient became infinite or NaN; the message says where the batch was saved."""


class DiskFullError(RunError):
    """A file could not be written whole; the message says what is left to go on from."""


class StopRequest:
    """Context in which Ctrl-C (or SIGTERM) asks for a stop after the step; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _ask(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def full_memory_or_disk_told(config: TrainConfig) -> Iterator[None]:
    """Context of a run that says in one sentence that memory or disk is full, and how to go on.

    Raises:
        OutOfMemoryError: memory ran out.
        DiskFullError: a checkpoint or the metrics could not be written.
    """
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise elsewhere(error, config) from error
        if not _is_full_disk(error):
            raise
        folder = Path(config.output)
        whole = checkpoint_folders(folder / CHECKPOINTS)
        left = (
            f"The last whole checkpoint is {whole[-1]}. Make room, then go on: tgpo-lab train --resume {folder}"
            if whole
            else f"There is no checkpoint yet: make room, then begin again: tgpo-lab train --resume {folder}"
        )
        raise DiskFullError(f"A file of the run could not be written ({error}). {left}") from error


def _is_full_disk(error: Exception) -> bool:
    """No space, no quota, or a file larger than allowed; safetensors tells them by text alone."""
    codes = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    if isinstance(error, SafetensorError):
        return any(f"os error {code}" in str(error) for code in codes)
    return isinstance(error, OSError) and error.errno in codes


def refuse_non_finite(
    norm: float, sums: dict[str, float], folder: Path, step: int, batch: Batch, processes: Processes
) -> None:
    """Stop where the gradient's norm or a loss is not finite, and keep the batch.

    Args:
        norm: of the gradient.
        sums: losses by name.
        folder: of the run.
        step: for the message.
        batch: what the step was about to learn from.
        processes: the first of them writes.

    Raises:
        NonFiniteError: it is not.
    """
    bad = next((name for name, value in sums.items() if not math.isfinite(value)), None)
    if bad is None and math.isfinite(norm):
        return
    bad = bad or "the gradient"
    kept = folder / f"failed-step-{step:06d}"
    processes.first_alone(save_failed_batch, kept, step, bad, batch)
    raise NonFiniteError(
        f"Step {step}: {bad} is not finite (gradient norm {norm}). No update was made. The batch is in "
        f"{kept}, the last good checkpoint in {latest_checkpoint(folder)}. A lower learning rate "
        "or a smaller weight of the teacher term is the usual remedy."
    )


def save_failed_batch(target: Path, step: int, where: str, batch: Batch) -> None:
    """Keep the batch of a failed step in the folder ``target``: tensors as safetensors, the rest as JSON."""
    with written_folder(target) as writing:
        tensors = {
            "responses": batch.rollouts.responses,
            "mask": batch.rollouts.mask,
            "rewards": batch.rewards,
            "from_teacher": batch.from_teacher,
            "teacher_logprobs": batch.teacher.logprobs,
            "teacher_tokens": batch.teacher.tokens,
        }
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, writing / "batch.safetensors")
        write_json(writing / "failure.json", {"step": step, "where": where, "prompts": batch.rollouts.prompts})
