"""A run's folder: what it holds and how to read it."""

from __future__ import annotations

import json
import uuid
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from transformers import PreTrainedModel

from .checkpoints import checkpoint_folders, read_state
from .config import TrainConfig
from .errors import InputError
from .files import held_folder, require_name, require_writable_folder, write_json
from .metrics import metrics_frame, read_rows
from .models.pairs import load_model
from .provenance import provenance

CONFIG_FILE, METRICS_FILE, CHECKPOINTS = "config.json", "metrics.jsonl", "checkpoints"
# A resumed run may be longer, kept or shown otherwise; everything else decides its numbers.
CHANGEABLE_ON_RESUME = {"steps", "output", "checkpoint_every", "keep_checkpoints", "trackers",
                         # These decide memory, and of the numbers no more than rounding: a teacher elsewhere computes
                         # the same with other kernels, and a resume may also move the student to another device.
                         "micro_batch_tokens", "sampling_rows", "gradient_checkpointing", "fused_kernels",
                         "vllm_memory_share", "vllm_sleep", "teacher_device", "teacher_offload",
                         # A server may move.
                         "teacher_server", "teacher_server_model", "teacher_server_requests", "teacher_server_timeout",
                         "teacher_server_retries"}  # fmt: skip


@dataclass
class RunResult:
    """What a training run left behind."""

    directory: Path
    config: TrainConfig
    metrics: pd.DataFrame
    """One row a step; columns are defined in :data:`tgpo_lab.metrics.METRICS`."""
    student: PreTrainedModel
    """The student after the last update; under FSDP this process's part of it."""
    completed: bool
    """False if the run was stopped before its last step."""

    @property
    def how_to_go_on(self) -> str:
        """Of a run that was stopped: after which step, and the command that goes on."""
        made = 0 if self.metrics.empty else int(self.metrics["step"].max()) + 1
        return f"Stopped after step {made} of {self.config.steps}. To go on: tgpo-lab train --resume {self.directory}"


def require_new_run(directory: Path, *, keep: bool) -> None:
    """Refuse a folder that a new run cannot have.

    Args:
        directory: of the run.
        keep: let it stay where it had to be made.

    Raises:
        InputError: the folder cannot be written, or holds a run already.
    """
    require_name(directory)
    if (directory / CONFIG_FILE).exists():
        raise InputError(
            f"{directory} already holds a run. Give another output folder, remove it, or go on with it: "
            f"tgpo-lab train --resume {directory}"
        )
    require_writable_folder(directory, keep=keep)


def held_run(directory: Path) -> AbstractContextManager[None]:
    """Context in which no other launch can make or go on with the run in a folder, which is made if need be.

    Raises:
        InputError: the folder cannot be written, or another process holds it.
    """
    require_writable_folder(require_name(directory))
    return held_folder(
        directory,
        f"Another process is at work on the run in {directory}. Wait for it to end, or stop it.",
    )


def start_run(config: TrainConfig, digests: dict[str, str]) -> Path:
    """Put configuration and provenance of a new run into its folder, which is held by :func:`held_run`.

    Args:
        config: the run.
        digests: of its :mod:`tgpo_lab.run_inputs`.

    Raises:
        InputError: the folder cannot be written, or holds a run already.
    """
    directory = Path(config.output)
    require_new_run(directory, keep=True)
    _write_record(directory, {"config": config.as_dict(), "id": _new_id(), "digests": digests, **provenance()})
    return directory


def store_changes(config: TrainConfig, step: int, digests: dict[str, str] | None = None) -> None:
    """Let a run go on with the configuration of this resume from now on, so that the next one needs no flags.

    Under ``changes`` stand the fields' earlier values, the step at which they were changed, and the command's
    provenance; that of the first command stays where it is.

    Args:
        config: of the resume, which :func:`check_resumable` has passed.
        step: from which it goes on.
        digests: of its :mod:`tgpo_lab.run_inputs`, for a run that begins again.

    Raises:
        InputError: the folder holds no run, or cannot be written.
    """
    directory = Path(config.output)
    given = config.as_dict()
    # A folder that was moved is no change.
    before = {
        name: value
        for name, value in read_config(directory).as_dict().items()
        if name != "output" and value != given[name]
    }
    record = json.loads((directory / CONFIG_FILE).read_text())
    new = {} if "id" in record else {"id": _new_id()}  # a run of a version that gave none
    if digests is not None and record.get("digests") != digests:
        new["digests"] = digests
    if before:
        changes = [*record.get("changes", []), {"step": step, "before": before, **provenance()}]
        new |= {"config": given, "changes": changes}
    if new:
        _write_record(directory, {**record, **new})


def read_id(directory: Path) -> str:
    """What trackers know a run by: its own, and the same after every resume."""
    return json.loads((directory / CONFIG_FILE).read_text())["id"]


def _new_id() -> str:
    return uuid.uuid4().hex[:8]


def _write_record(directory: Path, record: dict) -> None:
    try:
        write_json(directory / CONFIG_FILE, record)
    except OSError as error:  # an empty file was possible, so it is room that is missing
        raise InputError(
            f"Cannot write to the folder {directory} ({error.strerror}). Make room, or give another output folder."
        ) from error


def read_config(directory: Path) -> TrainConfig:
    """Configuration of a stored run.

    Raises:
        InputError: the folder holds no run, or one with settings that are not known here.
    """
    file = Path(directory) / CONFIG_FILE
    try:
        return TrainConfig.from_dict(json.loads(file.read_text())["config"])
    except InputError as error:
        raise InputError(
            f"{file} cannot be read: {error} Take the version of tgpo_lab that made the run, which the file names, or "
            "restore the file."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{directory} holds no run ({file.name}: {error}). Give the output folder of a run."
        ) from error


def check_resumable(config: TrainConfig, directory: Path) -> None:
    """Refuse to go on with a run under another configuration.

    Raises:
        InputError: names the first field that differs.
    """
    stored, given = read_config(directory).as_dict(), config.as_dict()
    for name in stored:
        # A server may have moved; but a teacher here and one behind a server do not round alike.
        moved = name == "teacher_server" and (stored[name] is None) != (given[name] is None)
        if (name not in CHANGEABLE_ON_RESUME or moved) and stored[name] != given[name]:
            raise InputError(
                f"{directory} was made with {name}={stored[name]!r}, not {given[name]!r}. An exact resume needs "
                # A folder may have been moved, but that is no choice of a resume.
                f"the same configuration (only {', '.join(sorted(CHANGEABLE_ON_RESUME - {'output'}))} may change)."
            )


def latest_checkpoint(directory: Path) -> Path:
    """The newest whole checkpoint of a run.

    Raises:
        InputError: there is none, or it is damaged.
    """
    found = checkpoint_folders(Path(directory) / CHECKPOINTS)
    if not found and _has_not_begun(Path(directory)):
        raise InputError(
            f"{directory} has no whole checkpoint: it was stopped before its first. To begin it again: tgpo-lab train "
            f"--resume {directory}"
        )
    if not found:
        raise InputError(f"{directory} has no whole checkpoint. Remove the folder and start again.")
    read_state(found[-1])
    return found[-1]


def resume_checkpoint(directory: Path, steps: int) -> Path | None:
    """The checkpoint that a resume goes on from; None for a run that was stopped before its first and begins again.

    Args:
        directory: of the run.
        steps: how many it is to have in all.

    Raises:
        InputError: more are made already, the newest is damaged, or there is none although steps were made.
    """
    if _has_not_begun(directory):
        return None
    checkpoint = latest_checkpoint(directory)
    made = read_state(checkpoint).step
    if made > steps:
        raise InputError(
            f"{directory} has made {made} steps, so steps={steps} leaves nothing to do. To go on, give steps "
            f"above {made}."
        )
    return checkpoint


def _has_not_begun(directory: Path) -> bool:
    return not checkpoint_folders(directory / CHECKPOINTS) and not (directory / METRICS_FILE).exists()


def load_run(directory: str | Path) -> RunResult:
    """Read a stored run, finished or not.

    Raises:
        InputError: no run there, or a damaged checkpoint.
    """
    directory = Path(directory)
    config = read_config(directory)
    checkpoint = latest_checkpoint(directory)
    return RunResult(
        directory,
        config,
        metrics_frame(read_rows(directory / METRICS_FILE)),
        load_model(checkpoint, torch.float32, "cpu"),
        completed=read_state(checkpoint).step >= config.steps,
    )
