"""The route of a class through nbgrader, end to end: generate, release, fetch, submit, collect, autograde."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tgpo_lab.cli import main

pytest.importorskip("nbgrader", reason="nbgrader is not installed: make test-class")

FOLDER = Path(__file__).parent.parent / "notebooks"
NAME = "03_two_kls"
SOLVED = """\
def both_kls(student_logits, teacher_logits):
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1), (student.exp() * (student - teacher)).sum(-1)
"""


@pytest.fixture
def nbgrader(tmp_path):
    """Runs an nbgrader command in a folder, with an exchange of its own."""
    (tmp_path / "exchange").mkdir(mode=0o777)
    (tmp_path / "exchange").chmod(0o777)
    # nbgrader looks for alembic on the path, as an activated environment has it.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    homes = {name: str(tmp_path / "home") for name in ("HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")}

    def run(folder: Path, *arguments: str) -> None:
        command = [
            sys.executable, "-m", "nbgrader", *arguments, "--CourseDirectory.course_id=course",
            f"--Exchange.root={tmp_path / 'exchange'}",
        ]  # fmt: skip
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, **homes, "PATH": path}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]

    return run


def test_a_class_is_graded_from_release_to_marks(nbgrader, tmp_path):
    import nbformat
    from nbgrader.api import Gradebook

    course, learner = tmp_path / "course", tmp_path / "learner"
    learner.mkdir()
    assert main(["class", "03", "--folder", str(FOLDER), "--course", str(course)]) == 0
    nbgrader(course, "generate_assignment", NAME, "--create")
    released = nbformat.read(course / "release" / NAME / f"{NAME}.ipynb", as_version=4)
    committed = nbformat.read(FOLDER / f"{NAME}.ipynb", as_version=4)
    # What nbgrader takes out is what our own stubs leave out.
    assert [cell.source for cell in released.cells] == [cell.source for cell in committed.cells]

    nbgrader(course, "release_assignment", NAME)
    nbgrader(learner, "fetch_assignment", NAME)
    work = learner / NAME / f"{NAME}.ipynb"
    notebook = nbformat.read(work, as_version=4)
    stub = next(cell for cell in notebook.cells if "def both_kls" in cell.source)
    stub.source = SOLVED  # one exercise of two
    nbformat.write(notebook, work)
    nbgrader(learner, "submit", NAME)
    nbgrader(course, "collect", NAME)
    nbgrader(course, "autograde", NAME)
    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as gradebook:
        (submission,) = gradebook.assignment_submissions(NAME)
        assert (submission.score, submission.max_score) == (1.0, 2.0)
