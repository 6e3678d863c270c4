"""How the benchmarks say in one sentence what cannot work, as the command line does (:mod:`tgpo_lab.cli`)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import tyro

from tgpo_lab.errors import InputError, RunError

Options = TypeVar("Options")


def run_script(main: Callable[[Options], None], options: type[Options]) -> None:
    """Call a script's main function with the options of its command line.

    Ends the process with status 2 and one sentence on the error output where options or input cannot work, with status
    1 and what was said where the benchmark could not go on.

    Args:
        main: measures, and writes the results.
        options: a dataclass; its ``__post_init__`` may raise :class:`InputError`, too.
    """
    try:
        main(tyro.cli(options))
    except (InputError, RunError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)


def require_at_least(least: int, options: object, *names: str) -> None:
    """Refuse numbers that are too small to measure anything.

    Raises:
        InputError: an option of one of the names is below ``least``.
    """
    for name in names:
        if getattr(options, name) < least:
            raise InputError(f"{name} must be {least} or more, but is {getattr(options, name)}.")
