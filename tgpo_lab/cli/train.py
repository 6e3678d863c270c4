"""``tgpo-lab train``: every field of the configuration and every option of the method as a flag."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

from ..config import PRESETS, TrainConfig
from ..errors import InputError
from ..methods import method_entries
from ..presets import BELONGING
from ..runs import read_config
from ..schedules import SCHEDULES, Schedule, parse_schedule


@dataclass(frozen=True)
class Choice:
    """What decides which other flags there are."""

    preset: str = "tiny"
    """Where the defaults come from."""
    method: str = "tgpo"
    """The method to train with."""
    resume: Path | None = None
    """Go on with the run in this folder; its own configuration is used."""
    quiet: bool = False
    """No progress bars, of downloads neither."""


def train_command(arguments: list[str]) -> int:
    """Train the student of a pair."""
    choice, config = parse_training(arguments)
    from accelerate import PartialState  # here, so that --help does not wait for the imports

    from ..doctor.settings_checks import warn_of_settings
    from ..progress_bars import hide_bars_of_downloads
    from ..training import train

    if choice.quiet:
        hide_bars_of_downloads()
    if choice.resume is None:
        warn_of_settings(config)
    result = train(config, resume=choice.resume is not None, show_progress=not choice.quiet)
    accuracy = result.metrics["accuracy"].dropna()
    is_first = PartialState().is_main_process
    if choice.quiet and not result.completed and is_first:  # otherwise the progress has said it
        print(result.how_to_go_on)
    if len(accuracy) and is_first:
        print(f"Held-out accuracy {accuracy.iloc[0]:.3f} → {accuracy.iloc[-1]:.3f}. The run is in {result.directory}.")
    return 0 if result.completed else 130


def parse_training(
    arguments: list[str], command: str = "train", purpose: str = "Train the student of a pair."
) -> tuple[Choice, TrainConfig]:
    """Read the command line in two passes: preset and method first, then the flags that these bring.

    Args:
        arguments: words after the command.
        command: its name, and
        purpose: what it is for, both for ``--help``.

    Raises:
        InputError: impossible values.
        SystemExit: wrong flags (status 2) or ``--help``.
    """
    choice, rest = tyro.cli(
        Choice, args=arguments, return_unknown_args=True, add_help=False, prog=f"tgpo-lab {command}"
    )
    if choice.resume is not None:
        for name, value in (("method", choice.method), ("preset", choice.preset)):
            if any(a.split("=")[0] == f"--{name}" for a in arguments):
                raise InputError(f"--resume goes on with the run's own settings; leave --{name} {value} out.")
        default = read_config(choice.resume).with_changes(output=str(choice.resume))
    else:
        default = TrainConfig.preset(choice.preset, choice.method, **_deciding(rest))
        default = default.with_changes(output="")
    with schedule_flags():
        config = tyro.cli(
            type(default),
            default=default,
            args=rest,
            prog=f"tgpo-lab {command}",
            description=_description(choice, purpose),
        )
    if choice.resume is not None and Path(config.output) != choice.resume:
        raise InputError(
            f"--resume goes on in the run's own folder {choice.resume}; leave --output {config.output} out. To keep "
            "the run as it is, copy its folder and resume the copy."
        )
    if not config.output:
        config = config.with_changes(output=f"runs/{choice.method}-{Path(config.student).name}")
    return choice, config


def _deciding(arguments: list[str]) -> dict[str, str]:
    """Given fields without which a preset's defaults for others would not fit."""
    found: dict[str, str] = {}
    for word, following in pairwise([*arguments, ""]):
        flag, joined, value = word.partition("=")
        if flag.startswith("--") and (name := flag[2:]) in BELONGING:
            found[name] = value if joined else following
    return found


def schedule_flags() -> ConstructorRegistry:
    """Context in which tyro reads a schedule from text such as ``"LinearDecay(0.02, 0.0002)"``."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def _(info: tyro.constructors.PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if info.type is not Schedule and info.type not in SCHEDULES.values():
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="SCHEDULE",
            instance_from_str=lambda words: parse_schedule(words[0]),
            is_instance=lambda value: isinstance(value, Schedule),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _description(choice: Choice, purpose: str) -> str:
    methods = "\n".join(f"  {entry.name:24} {entry.summary}" for entry in method_entries())
    return (
        f"{purpose} These four flags decide the defaults and the options below:\n\n"
        f"  --preset NAME          {' or '.join(PRESETS)} (now: {choice.preset})\n"
        f"  --method NAME          one of the methods (now: {choice.method})\n"
        "  --resume FOLDER        go on with the run in that folder\n"
        "  --quiet                no progress bars, of downloads neither\n\n"
        f"Methods:\n{methods}\n\n"
        'Schedules are written as in Python: "LinearDecay(0.02, 0.0002)", "Constant(0.02)",\n'
        '"Trapezoid(0.02, 50, 100)", "UntilAgreement(0.02)".'
    )
