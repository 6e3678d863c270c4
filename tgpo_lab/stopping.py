"""Stopping a long run between two steps, and stopping it where numbers are no longer finite."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

from safetensors.torch import save_file

from .batch import Batch
from .files import write_json, written_folder


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


def save_failed_batch(folder: Path, step: int, where: str, batch: Batch) -> Path:
    """Keep the batch of a failed step: tensors as safetensors, the rest as JSON. Returns its folder."""
    target = folder / f"failed-step-{step:06d}"
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
    return target
