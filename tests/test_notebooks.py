"""Notebooks: the committed ones are what their sources give, and are fit to be read. nbval runs them."""

import ast
import json
import re
from pathlib import Path

import pytest

from tgpo_lab.classroom import BEGIN, CHECK, learner_notebook, notebook_sources, solution_notebook
from tgpo_lab.errors import InputError
from tgpo_lab.exercises import EXERCISES, check
from tgpo_lab.exercises.checking import check_function

FOLDER = Path(__file__).parent.parent / "notebooks"
SOURCES = notebook_sources(FOLDER)
COMMITTED = [*sorted(FOLDER.glob("*.ipynb")), *sorted((FOLDER / "solutions").glob("*.ipynb"))]
CEILINGS = (1, 1, 2, 1, 1, 2, 2, 2, 3, 2, 2, 1, 1)  # minutes to run on two cores, by number
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")


def cells_of(notebook: dict, kind: str = "code") -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def text_of(value: str | list[str]) -> str:
    return value if isinstance(value, str) else "".join(value)


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def shape(notebook: dict) -> list[tuple]:
    """What must not drift: kinds, texts and grading of the cells."""
    return [
        (cell["cell_type"], text_of(cell["source"]), cell["id"], cell["metadata"].get("nbgrader"))
        for cell in notebook["cells"]
    ]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_committed_notebooks_are_what_the_source_gives(source):
    for made, folder in ((learner_notebook(source), FOLDER), (solution_notebook(source), FOLDER / "solutions")):
        committed = read(folder / f"{source.stem}.ipynb")
        assert shape(committed) == shape(json.loads(json.dumps(made))), "Make them again: tgpo-lab class " + source.name


def test_there_is_no_notebook_without_a_source():
    assert {path.stem for path in COMMITTED} == {source.stem for source in SOURCES}


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_outputs_are_fit_to_be_read(path):
    notebook = read(path)
    assert "widgets" not in notebook["metadata"], "Stored widget state needs a network in a static page."
    counts = [cell["execution_count"] for cell in cells_of(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "Cells were not run once each, in order."
    for cell in cells_of(notebook):
        for output in cell["outputs"]:
            assert output["output_type"] != "error", text_of(cell["source"])
            assert output.get("name") != "stderr", text_of(output["text"])
            shown = json.dumps(output.get("data", output.get("text", "")), ensure_ascii=False)
            assert "image/png" in shown or not re.search(r"/(home|work|tmp|root|Users)/|0x[0-9a-f]{6,}", shown), shown


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_head_and_end_are_complete(source):
    texts = [text_of(cell["source"]) for cell in cells_of(learner_notebook(source), "markdown")]
    number = source.stem[:2]
    assert texts[0].startswith(f"# {number} · ")
    for part in ("**Goal.**", "**Minutes.**", "**Prerequisites.**"):
        assert part in texts[0]
    assert "## Recap" in texts[-1]
    assert "**Next" in texts[-1] or source is SOURCES[-1]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_stated_minutes_hold_and_stand_in_the_readme(source):
    head = text_of(cells_of(learner_notebook(source), "markdown")[0]["source"])
    to_run, to_work = re.search(r"\*\*Minutes\.\*\* (\d+) to run on two cores, (\d+) to work through", head).groups()
    title = head.split("\n")[0].split(" · ")[1]
    rows = (FOLDER.parent / "README.md").read_text(encoding="utf-8").split("\n")
    (row,) = [row for row in rows if row.startswith(f"| {source.stem[:2]} |")]
    assert f"[{title}](notebooks/{source.stem}.ipynb)" in row
    assert f"| {to_run} | {to_work} |" in row
    assert int(to_run) <= CEILINGS[int(source.stem[:2])]
    measured = read(FOLDER.parent / "benchmarks" / "results" / "notebooks.json")["seconds"][source.stem]
    assert measured <= 60 * int(to_run)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_links_lead_somewhere(source):
    for cell in cells_of(learner_notebook(source), "markdown"):
        for target in LINK.findall(text_of(cell["source"])):
            assert target.startswith("https://") or (FOLDER / target).exists(), target


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_every_exercise_has_a_stub_that_fails_and_a_solution_that_passes(source):
    number = source.stem[:2]
    learner, solved = learner_notebook(source), solution_notebook(source)
    checked = []
    for position, cell in enumerate(learner.cells):
        if cell.cell_type != "code" or not (found := CHECK.search(cell.source)):
            continue
        exercise = found[1]
        checked.append(exercise)
        introduction = text_of(next(c.source for c in learner.cells[position::-1] if "### Exercise" in c.source))
        for part in (f"Exercise {exercise}", "Difficulty", "minutes", "<details>"):
            assert part in introduction, (exercise, part)
        imports = "\n".join(_imports(learner))
        for notebook, passes in ((learner, False), (solved, True)):
            names: dict[str, object] = {}
            exec(imports, names)
            writing = next(c for c in notebook.cells[position - 1 :: -1] if c.cell_type == "code")
            exec(writing.source, names)
            result = eval(cell.source, names)
            assert result.passed is passes, (exercise, result.message)
            assert result.points == (EXERCISES[exercise].points if passes else 0)
            assert passes or "Nothing here yet" in result.message
    assert checked == [name for name in EXERCISES if name.startswith(f"{number}.")]
    assert len(checked) <= 3


def _imports(notebook) -> list[str]:
    nodes = [node for cell in cells_of(notebook) for node in ast.parse(cell["source"]).body]
    return [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_readme_names_the_notebooks_that_one_needs(source):
    first = text_of(cells_of(read(FOLDER / f"{source.stem}.ipynb"), "markdown")[0]["source"])
    named = first.split("**Prerequisites.**")[1].split("\n\n")[0]
    needed = sorted(set(re.findall(r"\]\((\d\d)_", named)) - {"00"})  # which says where all this leads
    row = next(
        line
        for line in (FOLDER.parent / "README.md").read_text().splitlines()
        if f"({FOLDER.name}/{source.stem}" in line
    )
    assert row.split("|")[-2].strip() == (", ".join(needed) or "–")


@pytest.mark.parametrize(
    ("exercise", "message", "wrong"),
    [(exercise, *mistake) for exercise in EXERCISES.values() for mistake in exercise.wrong_functions()],
    ids=lambda value: value[:30] if isinstance(value, str) else getattr(value, "number", ""),
)
def test_each_known_mistake_is_named(exercise, message, wrong):
    result = check_function(exercise, wrong)
    assert not result.passed
    assert result.message == message


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=lambda exercise: exercise.number)
def test_the_reference_passes_and_nonsense_does_not(exercise):
    assert check_function(exercise, exercise.reference).passed
    assert "return missing" in check_function(exercise, lambda *arguments, **options: None).message
    assert not check_function(exercise, lambda *arguments, **options: 1 / 0).passed
    assert "takes a function" in check_function(exercise, 3).message


def test_an_unknown_exercise_is_refused():
    with pytest.raises(InputError, match=r"no exercise '99.1'"):
        check("99.1", lambda: 0)


def test_a_solution_without_an_end_is_refused(tmp_path):
    source = tmp_path / "01_broken.py"
    source.write_text(f"# %%\ndef f():\n    {BEGIN}\n    return 1\n")
    with pytest.raises(InputError, match="needs one"):
        learner_notebook(source)


def test_a_folder_without_sources_is_refused(tmp_path):
    with pytest.raises(InputError, match="no notebook sources"):
        notebook_sources(tmp_path)
