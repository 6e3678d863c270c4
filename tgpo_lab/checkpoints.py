"""Checkpoints: the student as an ordinary Hugging Face folder, beside it what an exact resume needs.

Random states are not stored: every generator is derived from the seed and the step
(:mod:`tgpo_lab.randomness`). Everything is JSON or safetensors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import InputError
from .files import write_json, write_text, written_folder
from .parallel.sharding import like
from .progress_bars import hide_bars_of_weights

STATE_FILE, OPTIMIZER_FILE = "state.json", "optimizer.safetensors"
PREFIX = "step-"


@dataclass(frozen=True)
class CheckpointState:
    """What stands in a checkpoint beside the weights."""

    step: int
    """Number of updates' batches that the student has learned from."""
    schedule: dict
    """State of the method's schedule."""


def save_checkpoint(
    folder: Path,
    state: CheckpointState,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: dict[str, torch.Tensor],
    keep: int,
    *,
    card: str = "",
    write_student: Callable[[PreTrainedModel, Path], None] = PreTrainedModel.save_pretrained,
) -> Path:
    """Write ``folder/step-NNNNNN``, whole or not at all, then remove all but the latest ``keep`` (0: none).

    ``optimizer`` comes from :func:`optimizer_tensors`, ``card`` is its README.md, and ``write_student`` writes the
    weights into a folder.
    """
    target = folder / f"{PREFIX}{state.step:06d}"
    with written_folder(target) as writing:
        hide_bars_of_weights()
        write_student(student, writing)
        tokenizer.save_pretrained(writing)
        save_file(optimizer, writing / OPTIMIZER_FILE)
        if card:
            write_text(writing / "README.md", card)
        files = sorted(file for file in writing.rglob("*") if file.is_file())
        sizes = {file.relative_to(writing).as_posix(): file.stat().st_size for file in files}
        write_json(writing / STATE_FILE, {"step": state.step, "schedule": state.schedule, "file_sizes": sizes})
    if keep:
        for old in checkpoint_folders(folder)[:-keep]:
            shutil.rmtree(old)
    return target


def checkpoint_folders(folder: Path) -> list[Path]:
    """Whole checkpoints under ``folder``, oldest first. Half-written ones, and copies that someone keeps beside them,
    have other names."""
    numbers = {p: p.name.removeprefix(PREFIX) for p in folder.glob(f"{PREFIX}*") if (p / STATE_FILE).exists()}
    return sorted((p for p, number in numbers.items() if number.isdecimal()), key=lambda p: int(numbers[p]))


def read_state(checkpoint: Path) -> CheckpointState:
    """Read and verify a checkpoint's state.

    Raises:
        InputError: a file is missing or has another size than when it was written.
    """
    try:
        values = json.loads((checkpoint / STATE_FILE).read_text())
        sizes, state = dict(values["file_sizes"]), CheckpointState(int(values["step"]), dict(values["schedule"]))
        if not sizes:
            raise KeyError("file_sizes")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{checkpoint} is not a whole checkpoint ({STATE_FILE}: {error}). Use an earlier one."
        ) from error
    for name, size in sizes.items():
        file = checkpoint / name
        found = file.stat().st_size if file.exists() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes where {size} were written"
            raise InputError(f"{file} {what}: the checkpoint is damaged or cut short. Remove it to use the one before.")
    return state


def load_optimizer(checkpoint: Path, student: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Give the optimiser back the state of a checkpoint.

    Raises:
        InputError: the file is damaged or belongs to another model.
    """
    file = checkpoint / OPTIMIZER_FILE
    try:
        tensors = load_file(file)
        shapes = {name: parameter.shape for name, parameter in student.named_parameters()}
        for key, tensor in tensors.items():
            name = key.split("|", 1)[1]
            if name not in shapes or (tensor.ndim and tensor.shape != shapes[name]):
                raise InputError(f"{file} belongs to another model: {key} does not fit. Remove the checkpoint.")
        for name, parameter in student.named_parameters():
            keys = [key for key in tensors if key.split("|", 1)[1] == name]
            if keys:
                # The step counter lives on the CPU, the moments beside their parameter.
                optimizer.state[parameter] = {
                    key.split("|", 1)[0]: tensors[key] if tensors[key].ndim == 0 else like(tensors[key], parameter)
                    for key in keys
                }
    except (SafetensorError, OSError, IndexError) as error:
        raise InputError(f"{file} is damaged ({error}). Remove the checkpoint to use the one before.") from error


def optimizer_tensors(student: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimiser's state by its kind and the parameter's name."""
    return {
        f"{key}|{name}": value.detach().contiguous()
        for name, parameter in student.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
