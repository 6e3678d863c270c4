"""From one source a notebook in three forms: for learners, with solutions, and for grading.

    notebooks/source/NN_name.py        the source, as jupytext writes notebooks, with the solutions in it
    notebooks/NN_name.ipynb            the learner's: solutions taken out; run from top to bottom
    notebooks/solutions/NN_name.ipynb  the same with the solutions; run likewise
    COURSE/source/NN_name/             for a course of nbgrader's, which takes the solutions out itself; not run

A code cell with a region from ``### BEGIN SOLUTION`` to ``### END SOLUTION`` is an exercise, a cell that calls
``check("NN.M", …)`` grades it: these are nbgrader's own markers, and the cells get its metadata.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import InputError
from .exercises import EXERCISES
from .files import require_writable_folder, write_text

if TYPE_CHECKING:
    from nbformat import NotebookNode

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
STUB = ("# YOUR CODE HERE", "raise NotImplementedError()")  # what nbgrader puts in place of a solution
CHECK = re.compile(r'^check\("([^"]+)"', re.MULTILINE)
CELL_TIMEOUT = 600  # seconds
STARTUP = Path(__file__).with_name("notebook_guard.py")


def notebook_sources(folder: Path) -> list[Path]:
    """Sources of all notebooks in order.

    Raises:
        InputError: there are none.
    """
    found = sorted((folder / "source").glob("[0-9][0-9]_*.py"))
    if not found:
        raise InputError(f"There are no notebook sources in {folder / 'source'}. Give the folder that holds source/.")
    return found


def instructor_notebook(source: Path) -> NotebookNode:
    """A notebook as its source has it, markers and solutions included, with nbgrader's metadata; not run.

    Raises:
        InputError: a solution is not closed, or a check names an exercise that does not exist.
    """
    import jupytext

    notebook = jupytext.read(source)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    number = source.name[:2]
    for place, cell in enumerate(notebook.cells):
        cell.id = f"{number}-{place:03d}"  # the same at every build
        if cell.cell_type != "code":
            continue
        checked = CHECK.search(cell.source)
        if BEGIN in cell.source or END in cell.source:
            if len(re.findall(BEGIN, cell.source)) != len(re.findall(END, cell.source)):
                raise InputError(f"{source.name}, cell {place}: every {BEGIN} needs one {END}.")
            cell.metadata["nbgrader"] = _grading(cell.id, solution=True)
        elif checked:
            if checked[1] not in EXERCISES:
                raise InputError(f"{source.name}, cell {place}: there is no exercise {checked[1]!r}.")
            cell.metadata["nbgrader"] = _grading(cell.id, points=EXERCISES[checked[1]].points)
    return notebook


def _grading(identity: str, *, solution: bool = False, points: int = 0) -> dict[str, object]:
    base = {"grade": not solution, "grade_id": identity, "locked": not solution, "schema_version": 3,
            "solution": solution, "task": False, "cell_type": "code"}  # fmt: skip
    return base if solution else {**base, "points": points}


def learner_notebook(source: Path) -> NotebookNode:
    """Solutions replaced by a line that raises; not run."""
    notebook = instructor_notebook(source)
    for cell in notebook.cells:
        if cell.cell_type == "code" and BEGIN in cell.source:
            cell.source = "\n".join(_without_solution(cell.source.split("\n")))
    return notebook


def _without_solution(lines: list[str]) -> Iterator[str]:
    inside = False
    for line in lines:
        if BEGIN in line:
            inside = True
            indent = line[: len(line) - len(line.lstrip())]
            yield from (indent + stub for stub in STUB)
        elif END in line:
            inside = False
        elif not inside:
            yield line


def solution_notebook(source: Path) -> NotebookNode:
    """Solutions in place, without the markers; not run."""
    notebook = instructor_notebook(source)
    for cell in notebook.cells:
        if cell.cell_type == "code" and BEGIN in cell.source:
            cell.source = "\n".join(line for line in cell.source.split("\n") if BEGIN not in line and END not in line)
    return notebook


def run_notebook(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Run all cells in order, with ``folder`` as the working folder, and keep what is needed to show the outputs.

    Raises:
        InputError: a cell failed, wrote to the error stream or drew axes without labels.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        extra_arguments=["--log-level=ERROR"],
        coalesce_streams=True,  # how a cell's text is cut into messages depends on the machine's load
    )
    try:
        with _guarded():
            client.execute()
    except CellExecutionError as error:
        raise InputError(f"A cell failed: {error}") from error
    notebook.metadata.pop("widgets", None)  # a static page would look for a network to draw stored widgets
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stderr":
                raise InputError(f"A cell wrote to the error stream: {output.text}\n{cell.source}")
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


@contextmanager
def _guarded() -> Iterator[None]:
    """Kernels that start in here check their figures (:mod:`tgpo_lab.notebook_guard`)."""
    before = os.environ.get("PYTHONSTARTUP")
    os.environ["PYTHONSTARTUP"] = str(STARTUP)
    try:
        yield
    finally:
        os.environ.pop("PYTHONSTARTUP")
        if before is not None:
            os.environ["PYTHONSTARTUP"] = before


def build(source: Path, folder: Path) -> None:
    """Write the learner's notebook and the one with solutions, both run.

    Raises:
        InputError: a cell failed, or the folder cannot be written.
    """
    import nbformat

    for make, place in ((learner_notebook, folder), (solution_notebook, folder / "solutions")):
        require_writable_folder(place)
        done = run_notebook(make(source), folder)
        write_text(place / f"{source.stem}.ipynb", nbformat.writes(done) + "\n")


def write_course(sources: list[Path], course: Path) -> None:
    """Put notebooks into a course of nbgrader's as assignments, one for each notebook that has exercises.

    Args:
        sources: of the notebooks.
        course: folder of the course; ``source/NN_name`` in it is written anew.

    Raises:
        InputError: the folder cannot be written.
    """
    import nbformat

    for source in sources:
        notebook = instructor_notebook(source)
        if any("nbgrader" in cell.metadata for cell in notebook.cells):
            assignment = require_writable_folder(course / "source" / source.stem)
            write_text(assignment / f"{source.stem}.ipynb", nbformat.writes(notebook) + "\n")
