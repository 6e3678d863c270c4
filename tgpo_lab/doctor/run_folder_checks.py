"""The doctor's look at the folder of a run: whether a new one can have it, and where one that goes on stands."""

from __future__ import annotations

from pathlib import Path

import torch

from ..checkpoints import read_state
from ..config import TrainConfig
from ..errors import InputError
from ..loop.preparation import take_checkpoint
from ..models.pairs import Pair
from ..run_inputs import require_same_inputs
from ..runs import check_resumable, require_new_run, resume_checkpoint
from .diagnosis import Diagnosis


def check_output(found: Diagnosis, config: TrainConfig, resume: bool) -> Path | None:
    """The newest checkpoint of a run that is to go on; None for a new run, one that begins again
    because it has none yet, or where it cannot go on.

    Nothing ends here: the pair can be looked at all the same.
    """
    directory = Path(config.output)
    try:
        if not resume:
            require_new_run(directory, keep=False)
            return None
        check_resumable(config, directory)
        checkpoint = resume_checkpoint(directory, config.steps)
    except InputError as error:
        found.add("refused", "output", str(error))
        return None
    if checkpoint is None:
        return None
    step = read_state(checkpoint).step
    if step == config.steps:
        found.run_finished = True
        found.add(
            "warning", "output", f"The run in {directory} is finished: its newest checkpoint is of step {step} of "
            f"{config.steps}.", "To go on with it, give more --steps.",
        )  # fmt: skip
    return checkpoint


def check_same_inputs(found: Diagnosis, config: TrainConfig, pair: Pair, digests: dict[str, str]) -> None:
    """Whether a run that goes on finds the prompts and weights with which it began; arguments as of
    :func:`tgpo_lab.run_inputs.require_same_inputs`. Nothing ends here either."""
    try:
        require_same_inputs(config, pair, digests)
    except InputError as error:
        found.add("refused", "output", str(error))


def take_student(
    found: Diagnosis, config: TrainConfig, pair: Pair, checkpoint: Path | None, device: torch.device, *, resume: bool
) -> None:
    """Give a pair the student of a run that goes on, and say whose the figures are.

    Args:
        found: is added to.
        config: the run.
        pair: as loaded; its student is changed or replaced.
        checkpoint: of the run; None leaves the student as it is.
        device: of the student.
        resume: whether a run is to go on at all.
    """
    if checkpoint is None:
        if resume:
            found.add("ok", "student", f"{config.student} itself is looked at, as it was before the run.")
        return
    take_checkpoint(config, pair, checkpoint, device)
    found.add("ok", "student", f"The run's newest is looked at: {checkpoint}.")
