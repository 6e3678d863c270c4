"""Stopping a long run between two steps, and stopping it where numbers are no longer finite."""

from __future__ import annotations

import math
import signal
import threading
from pathlib import Path

from safetensors.torch import save_file

from .batch import Batch
from .files import write_json, written_folder
from .processes import Processes
from .runs import latest_checkpoint


class NonFiniteError(RuntimeError):
    """A loss or gradient became infinite or NaN; the message says where the batch was saved."""


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
