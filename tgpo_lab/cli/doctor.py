"""``tgpo-lab doctor``: an examination before training, with the options of ``tgpo-lab train``."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from .train import parse_training


@dataclass(frozen=True)
class Launch:
    """How the run would be started, its memory being that of one of its devices; and on how much to measure."""

    processes: int = 1
    """Number of processes, as --num_processes of accelerate launch."""
    sharded: tyro.conf.FlagCreatePairsOff[bool] = False
    """FSDP shares the student out among them, as --use_fsdp of accelerate launch."""
    prompts: int = 8
    """Number of held-out prompts to measure on."""
    card_tokens: int = 256
    """Responses for the measurements are cut after so many tokens, or after the run's own limit."""


def parse_launch(arguments: list[str]) -> tuple[Launch, list[str]]:
    """The doctor's own options, and the words that are left."""
    return tyro.cli(Launch, args=arguments, return_unknown_args=True, add_help=False, prog="tgpo-lab doctor")


def doctor_command(arguments: list[str]) -> int:
    """Examine a run; 0 if all is well, 1 with warnings, 2 if something was refused."""
    launch, rest = parse_launch(arguments)
    choice, config = parse_training(
        rest,
        "doctor",
        "Look at a run before it is started, with the options of train. --processes N and --sharded are for one that "
        "accelerate launch would start, the latter under FSDP. --prompts 8 and --card-tokens 256 say on how many "
        "held-out prompts to measure, and after how many tokens to cut responses for that.",
    )
    from ..doctor.diagnose import diagnose  # here, so that --help does not wait for the import

    found = diagnose(config, **vars(launch), resume=choice.resume is not None)
    print(found)
    return found.status
