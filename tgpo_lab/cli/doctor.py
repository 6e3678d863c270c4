"""``tgpo-lab doctor``: an examination before training, with the options of ``tgpo-lab train``."""

from __future__ import annotations

from .train import parse_training


def doctor_command(arguments: list[str]) -> int:
    """Examine a run; 0 if all is well, 1 with warnings, 2 if something was refused."""
    _, config = parse_training(arguments, "doctor", "Look at a run before it is started: the options of train.")
    from ..doctor.diagnose import diagnose  # here, so that --help does not wait for the import

    found = diagnose(config)
    print(found)
    return found.status
