"""``tgpo-lab class``: notebooks for learners and with solutions, from their sources."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from ..errors import InputError


def class_command(arguments: list[str]) -> int:
    """Parse and run ``tgpo-lab class``."""
    return tyro.cli(make_notebooks, args=arguments, prog="tgpo-lab class")


def make_notebooks(
    numbers: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="NUMBER")] = (),
    folder: Path = Path("notebooks"),
) -> int:
    """Make the learner's notebooks and the ones with solutions from folder/source, and run them.

    Args:
        numbers: Of the notebooks to make, for instance 03; all by default.
        folder: Folder with the notebooks.
    """
    from ..classroom import build, notebook_sources

    sources = notebook_sources(folder)
    known = {source.name[:2]: source for source in sources}
    for number in numbers:
        if number not in known:
            raise InputError(f"There is no notebook {number!r} in {folder}: there are {', '.join(known)}.")
    for number, source in known.items():
        if not numbers or number in numbers:
            print(f"{source.stem} …", flush=True)
            build(source, folder)
    return 0
