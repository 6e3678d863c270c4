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
    course: Path | None = None,
) -> int:
    """Make the learner's notebooks and the ones with solutions from folder/source, and run them.

    Args:
        numbers: Of the notebooks to make, for instance 03; all by default.
        folder: Folder with the notebooks.
        course: Folder of an nbgrader course: put the notebooks into it as assignments, with solutions and markers,
            in place of making and running them.
    """
    from ..classroom import build, notebook_sources, write_course

    known = {source.name[:2]: source for source in notebook_sources(folder)}
    for number in numbers:
        if number not in known:
            raise InputError(f"There is no notebook {number!r} in {folder}: there are {', '.join(known)}.")
    wanted = [source for number, source in known.items() if not numbers or number in numbers]
    if course is not None:
        write_course(wanted, course)
        print(f"Written to {course / 'source'}. Next, in {course}: nbgrader generate_assignment {wanted[0].stem}")
        return 0
    for source in wanted:
        print(f"{source.stem} …", flush=True)
        build(source, folder)
    return 0
