"""The rows of ``metrics.jsonl`` sent to TensorBoard, Weights & Biases or Trackio as well, by accelerate's trackers."""

from __future__ import annotations

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
    """Refuse trackers that are unknown or not installed.

    Raises:
        InputError: names the first one.
    """
    for name in names:
        if name not in INSTALL:
            raise InputError(f"Unknown tracker {name!r}: choose from {', '.join(INSTALL)}.")
        if importlib.util.find_spec(name) is None:
            raise InputError(f"The tracker {name} is not installed: {INSTALL[name]}.")


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
    accelerator: Accelerator, run: str, settings: Mapping[str, object]
) -> Iterator[Callable[[dict[str, float]], None]]:
    """Start the trackers of an accelerator; gives a function that sends them a row, and ends them with the block.

    Args:
        accelerator: of :func:`tracking_accelerator`.
        run: name of the run.
        settings: its configuration as plain values.
    """
    if not accelerator.log_with:
        yield lambda row: None
        return
    texts = {
        name: value if isinstance(value, (bool, int, float, str)) else str(value) for name, value in settings.items()
    }
    name = {"name": run}
    accelerator.init_trackers(PROJECT, texts, init_kwargs={"wandb": name, "trackio": name})
    try:
        yield lambda row: accelerator.log({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))
    finally:
        accelerator.end_training()
