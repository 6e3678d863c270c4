"""The rows of ``metrics.jsonl`` sent to TensorBoard, Weights & Biases or Trackio as well, by accelerate's trackers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from .errors import InputError

if TYPE_CHECKING:
    from .config import TrainConfig

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


def tracking_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of a run with its trackers, which :func:`tracked` starts. TensorBoard's files go to the run's
    folder ``tensorboard``."""
    folder = Path(config.output)
    return Accelerator(
        mixed_precision="no",  # fixed once for a process; the loop's own autocast can differ from run to run
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "tensorboard")),
    )


@contextmanager
def tracked(accelerator: Accelerator, config: TrainConfig) -> Iterator[Callable[[dict[str, float]], None]]:
    """Start the run's trackers; gives a function that sends them a row, and ends them with the block."""
    if not config.trackers:
        yield lambda row: None
        return
    settings = {
        name: value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in config.as_dict().items()
    }
    name = {"name": Path(config.output).name}
    accelerator.init_trackers(PROJECT, settings, init_kwargs={"wandb": name, "trackio": name})
    try:
        yield lambda row: accelerator.log({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))
    finally:
        accelerator.end_training()
