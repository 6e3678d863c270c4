"""Stopping a long run between two steps, and where it cannot go on: numbers, memory, disk, the teacher's server."""

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
from ..runs import CHECKPOINTS, CONFIG_FILE, latest_checkpoint
from ..teachers.prompt_logprobs import TeacherServerError
from .out_of_memory import elsewhere


class NonFiniteError(RunError):
    """A loss or gradient became infinite or NaN; the message says where the batch was saved."""


class DiskFullError(RunError):
    """A file could not be written whole, for want of room or of its folder; the message says what is left to go on
    from."""


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""No space, no quota, or a file larger than allowed."""
FAILING = {errno.EIO, errno.EROFS, errno.ESTALE}
"""The disk fails, was made read-only for that, or is another machine's that has gone."""
LOST = {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM}
"""The file's folder is not there any more, or no longer open to this user."""


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
def failures_told(config: TrainConfig) -> Iterator[None]:
    """Context of a run that says how to go on, where memory or disk is full, the disk gone or the teacher's server.

    Raises:
        OutOfMemoryError: memory ran out.
        DiskFullError: a checkpoint or the metrics could not be written.
        TeacherServerError: it failed.
    """
    folder = Path(config.output)
    try:
        yield
    except TeacherServerError as error:
        raise TeacherServerError(f"{error} {_how_to_go_on(folder, 'once that is put right,')}") from error
    except RunError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise elsewhere(error, config) from error
        if _is_of_the_disk(error, FULL):
            remedy = "make room"
        elif _is_of_the_disk(error, FAILING) or _is_of_the_disk(error, LOST, within=folder):
            remedy = f"see that {folder} can be written again"
        else:
            raise
        left = _how_to_go_on(folder, f"{remedy}, then")
        raise DiskFullError(f"A file of the run could not be written ({error}). {left}") from error


def _how_to_go_on(folder: Path, once: str) -> str:
    """With what a run goes on, after the half-sentence that says once what is done."""
    whole = checkpoint_folders(folder / CHECKPOINTS)
    again = f"tgpo-lab train --resume {folder}"
    if whole:
        return f"The last whole checkpoint is {whole[-1]}. {once[0].upper()}{once[1:]} go on: {again}"
    if (folder / CONFIG_FILE).exists():
        return f"There is no checkpoint yet: {once} begin again: {again}"
    return f"{folder} holds the run no more: restore it, or start the run anew."


def _is_of_the_disk(error: Exception, codes: set[int], within: Path | None = None) -> bool:
    """Whether an error has one of the codes, of a file below ``within`` if that is given; safetensors tells codes by
    text alone, and no file."""
    if isinstance(error, SafetensorError):
        return any(f"(os error {code})" in str(error) for code in codes)
    if not isinstance(error, OSError) or error.errno not in codes:
        return False
    if within is None:
        return True
    return error.filename is not None and Path(error.filename).absolute().is_relative_to(within.absolute())


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
