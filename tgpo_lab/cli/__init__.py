"""The command line: ``tgpo-lab`` or ``python -m tgpo_lab``. Parsed by tyro from dataclasses and functions.

A command imports what it needs when it runs, so that ``--help`` answers at once. Bad input is one
sentence on the error stream and exit status 2.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from ..errors import InputError, RunError
from ..loop.allocator import use_large_pages

CLOSED_PIPE = 141
"""Exit status of a program that SIGPIPE has ended."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    use_large_pages()  # no tensor has been made yet
    try:
        try:
            return _run(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()  # not as Python ends, when nothing can catch what goes wrong
    except BrokenPipeError:  # what is printed is read no further, as of `tgpo-lab train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left
        return CLOSED_PIPE


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        print(_overview())
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    try:
        if name not in COMMANDS:
            raise InputError(f"Unknown command {name!r}: choose one of {', '.join(COMMANDS)}.")
        return COMMANDS[name][0](rest)
    except InputError as error:
        print(f"tgpo-lab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tgpo-lab: interrupted.", file=sys.stderr)
        return 130
    except RunError as error:
        print(f"tgpo-lab: {error}", file=sys.stderr)
        return 1


def _overview() -> str:
    lines = [f"  {name:10} {summary}" for name, (_, summary) in COMMANDS.items()]
    return (
        "usage: tgpo-lab COMMAND [options]\n\n"
        "On-policy distillation of language models: reverse KL, GRPO, TGPO and their relatives.\n\n"
        + "\n".join(lines)
        + "\n\nEvery command explains itself: tgpo-lab COMMAND --help"
    )


def _demo(arguments: list[str]) -> int:
    from .demo import demo_command

    return demo_command(arguments)


def _train(arguments: list[str]) -> int:
    from .train import train_command

    return train_command(arguments)


def _doctor(arguments: list[str]) -> int:
    from .doctor import doctor_command

    return doctor_command(arguments)


def _evaluate(arguments: list[str]) -> int:
    from .evaluate import evaluate_command

    return evaluate_command(arguments)


def _pairs(arguments: list[str]) -> int:
    from .pairs import pairs_command

    return pairs_command(arguments)


def _study(arguments: list[str]) -> int:
    from .study import study_command

    return study_command(arguments)


def _class(arguments: list[str]) -> int:
    from .classroom import class_command

    return class_command(arguments)


def _bench(arguments: list[str]) -> int:
    from .bench import bench_command

    return bench_command(arguments)


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "demo": (_demo, "train reverse KL, GRPO and TGPO on the far pair, and write a report"),
    "train": (_train, "train the student of any pair with any method"),
    "doctor": (_doctor, "examine a pair, its prompts and the batch before training"),
    "evaluate": (_evaluate, "accuracy of a student or teacher on held-out prompts"),
    "pairs": (_pairs, "list, measure or rebuild pairs"),
    "study": (_study, "run a named study over methods, pairs and seeds, or report on it"),
    "class": (_class, "make the learners' notebooks and those with solutions from their sources"),
    "bench": (_bench, "tokens per second by phase, seconds per step, peak memory"),
}
