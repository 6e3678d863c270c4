"""The rows of ``metrics.jsonl`` sent to TensorBoard, Weights & Biases or Trackio as well, by accelerate's trackers."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from .errors import InputError
from .parallel.processes import start_options

INSTALL = {
    "tensorboard": "pip install 'tgpo-lab[tensorboard]'",
    "wandb": "pip install wandb",
    "trackio": "pip install trackio",
}
"""Known trackers, and how each is installed."""
PROJECT = "tgpo-lab"


def require_trackers(names: tuple[str, ...]) -> None:
    """Refuse trackers that are unknown, not installed, or installed and broken.

    Raises:
        InputError: names the first one.
    """
    for name in names:
        if name not in INSTALL:
            raise InputError(f"Unknown tracker {name!r}: choose from {', '.join(INSTALL)}.")
        if importlib.util.find_spec(name) is None:
            raise InputError(f"The tracker {name} is not installed: {INSTALL[name]}.")
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a package raises that finds its own parts in other versions
            raise InputError(
                f"The tracker {name} is installed, but cannot be imported ({type(error).__name__}: {error}). "
                f"Install it anew, or leave it out: {INSTALL[name]}."
            ) from error
        try:
            importlib.metadata.distribution(name)  # accelerate leaves a tracker without it out
        except importlib.metadata.PackageNotFoundError as error:
            raise InputError(
                f"The tracker {name} is not installed: only a folder or module of that name was found, such as "
                f"Weights & Biases makes for its runs. To install it: {INSTALL[name]}."
            ) from error


def tracking_accelerator(folder: Path, trackers: Sequence[str]) -> Accelerator:
    """The accelerator of a run in ``folder`` with its trackers, which :func:`tracked` starts. TensorBoard's files go to
    ``folder/tensorboard``."""
    return Accelerator(
        mixed_precision="no",  # fixed once for a process; the loop's own autocast can differ from run to run
        log_with=list(trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "tensorboard")),
        **start_options(),
    )


@contextmanager
def tracked(
    accelerator: Accelerator, folder: Path, settings: Mapping[str, object], run_id: str
) -> Iterator[Callable[[dict[str, float]], None]]:
    """Start the trackers of an accelerator; gives a function that sends them a row, and ends them with the block.

    Args:
        accelerator: of :func:`tracking_accelerator`.
        folder: of the run, which has its first checkpoint. Its name is the run's.
        settings: its configuration as plain values.
        run_id: the same after a resume, so that the trackers go on with their run, and of no other run.

    Raises:
        InputError: a tracker does not start, for instance without a login.
    """
    if not accelerator.log_with:
        yield lambda row: None
        return
    texts = {
        name: value if isinstance(value, (bool, int, float, str)) else str(value) for name, value in settings.items()
    }
    options = {
        "wandb": {"name": folder.name, "id": run_id, "resume": "allow"},
        # Trackio knows a run by its name alone: without the id, runs of two folders of one name would be one.
        "trackio": {"name": f"{folder.name}-{run_id}", "resume": "allow"},
    }
    try:
        accelerator.init_trackers(PROJECT, texts, init_kwargs=options)
    except Exception as error:
        raise InputError(
            f"A tracker of this run does not start ({type(error).__name__}: {error}). Log in or set it to work "
            f"offline, or choose other trackers, and go on: tgpo-lab train --resume {folder}"
        ) from error
    try:
        yield lambda row: accelerator.log({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))
    finally:
        accelerator.end_training()
