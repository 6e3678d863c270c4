"""The scripts in benchmarks/, each in a process of its own with minimal sizes. Times are never asserted."""

import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "benchmarks" / "README.md"


@pytest.fixture
def kept_results(monkeypatch):
    """The module that the scripts share; they import it as their neighbour."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module("kept_results")
    sys.modules.pop("kept_results")


def run_script(script, *arguments, **variables):
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *arguments], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **variables},
    )  # fmt: skip


def test_a_table_takes_the_place_of_the_one_before_and_only_from_the_own_file(tmp_path, monkeypatch, kept_results):
    readme, own, text = tmp_path / "README.md", tmp_path / "results" / "own.json", "# Märkte\n{}\nMore.\n"
    block = "<!-- {0} table: start -->\n{1}\n<!-- {0} table: end -->"
    readme.write_text(text.format(block.format("one", "old") + "\n" + block.format("two", "kept")), encoding="utf-8")
    monkeypatch.setattr(kept_results, "README", readme)
    kept_results.keep_results({"a": 1}, "elsewhere", tmp_path / "other.json", own, "one table")
    assert "old" in readme.read_text(encoding="utf-8") and json.loads((tmp_path / "other.json").read_text()) == {"a": 1}
    for table in ("new", "newest"):
        kept_results.keep_results({"a": 2}, table, own, own, "one table")
        wanted = text.format(block.format("one", table) + "\n" + block.format("two", "kept"))
        assert readme.read_text(encoding="utf-8") == wanted and json.loads(own.read_text()) == {"a": 2}


def test_sampling_beside_its_floor(tmp_path):
    before, output = README.read_bytes(), tmp_path / "sampling.json"
    run = run_script(
        "sampling.py", "--hidden-size", "16", "--intermediate-size", "24", "--layers", "1", "--heads", "4",
        "--key-value-heads", "2", "--vocabulary", "64", "--rows", "4", "--prompt-tokens", "2", "--response-tokens", "3",
        "--note", "Tried on a Sunday.", "--output", output,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    result = json.loads(output.read_text(encoding="utf-8"))
    # Query and its bias; keys and values, two heads 4 wide each; output; gate, up and down; three norms.
    layers = (16 * 16 + 16) + 2 * (16 * 8 + 8) + 16 * 16 + 3 * (16 * 24) + 3 * 16
    cached = 2 * 2 * 4 * 4  # keys and values, heads, width, rows
    # All weights for each of three tokens; before the second and the third 2 and 3 positions are in the cache.
    assert result["bytes"] == 4 * (3 * (64 * 16 + layers) + (2 + 3) * cached)
    assert result["floor_seconds"] == pytest.approx(result["bytes"] / result["bytes_per_second"])
    assert list(result["paths"]) == ["growing", "fixed"]
    for entry in result["paths"].values():
        median = statistics.median(entry["seconds"])
        assert len(entry["seconds"]) == 3
        assert entry["tokens_per_second"] == pytest.approx(4 * 3 / median)
        assert entry["times_the_floor"] == pytest.approx(median / result["floor_seconds"])
    assert "say nothing about a GPU. Tried on a Sunday." in run.stdout and result["versions"]["torch"]
    assert README.read_bytes() == before


def test_a_step_beside_its_floors(tmp_path):
    before, output = README.read_bytes(), tmp_path / "floor.json"
    run = run_script("step_floor.py", "--cases", "tiny", "--steps", "1", "--warmup-steps", "1", "--runs", "1",
                     "--output", output)  # fmt: skip
    assert run.returncode == 0, run.stderr
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["made_by"]["processor"] in run.stdout
    step = result["cases"][0]["rows"]["step"]
    lines = [line for line in run.stdout.splitlines() if line.startswith("| tiny | step |")]
    cells = [cell.strip() for cell in lines[0].strip("|").split("|")]
    told = [f"{step[f'{x}_seconds']:.3f}" for x in ("floor", "floor_of_mm")]
    assert [cells[3], cells[5]] == told
    assert float(cells[4]) == pytest.approx(step["seconds"] / step["floor_seconds"], abs=0.006)
    assert float(cells[6]) == pytest.approx(step["seconds"] / step["floor_of_mm_seconds"], abs=0.006)
    assert README.read_bytes() == before


# ── What cannot work ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def without_vllm(tmp_path):
    """A folder on the path whose sitecustomize hides an installed vLLM."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'vllm' else find(name, *rest)\n"
    )
    return f"{tmp_path}{os.pathsep}{ROOT}"


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("sampling.py", ["--rows", "3"], "rows must be a multiple of the samples of a prompt (4), but is 3."),
        ("sampling.py", ["--rounds", "0"], "rounds must be 1 or more, but is 0."),
        ("sampling.py", ["--paths", "growing", "vllm"], "engine is vllm, but vLLM is not installed: pip install "),
        ("against_trl.py", ["--rounds", "0"], "rounds must be 1 or more, but is 0."),
        ("against_trl.py", ["--cases", "small", "--engine", "vllm"], "engine is vllm, but vLLM is not installed: pip "),
        ("step_floor.py", ["--steps", "0"], "steps must be 1 or more, but is 0."),
        ("loss_memory.py", ["--repeats", "0"], "repeats must be 1 or more, but is 0."),
        ("loss_memory.py", ["--tokens", "0"], "tokens must be 1 or more, but is 0."),
        ("loss_memory.py", ["--vocabulary-size", "1"], "vocabulary_size must be 2 or more, but is 1."),
        ("loss_memory.py", ["--output", README], f"{README} holds no runs of this benchmark. Give another --output"),
    ],
)
def test_what_cannot_work_is_one_sentence(script, arguments, said, without_vllm):
    before = README.read_bytes()
    run = run_script(script, *arguments, PYTHONPATH=without_vllm)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith(f"{script}: {said}") and run.stderr.count("\n") == 1
    assert README.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--hovers", "0"], "hovers must be 1 or more, but is 0."),
        ([], "There is no Chromium: install it, or set CHROMIUM to its path."),
    ],
)
def test_the_explorer_is_not_timed_without_tokens_or_chromium(arguments, said, tmp_path):
    pytest.importorskip("playwright", reason="needs the extra browser")
    run = run_script("explorer_speed.py", *arguments, f"--output={tmp_path / 'out.json'}", PATH="", CHROMIUM="")
    assert (run.returncode, run.stdout, run.stderr) == (2, "", f"explorer_speed.py: {said}\n")


def test_a_notebook_that_fails_is_said_and_nothing_is_written(tmp_path):
    """The script beside notebooks of its own, of which the first has a cell that fails."""
    (tmp_path / "benchmarks").mkdir()
    for name in ("notebooks.py", "bad_input.py"):
        shutil.copy(ROOT / "benchmarks" / name, tmp_path / "benchmarks")
    (tmp_path / "notebooks" / "source").mkdir(parents=True)
    (tmp_path / "notebooks" / "source" / "01_fails.py").write_text("# %% [markdown]\n# # Head\n\n# %%\n1 / 0\n")
    run = subprocess.run(
        [sys.executable, "notebooks.py"], capture_output=True, text=True, cwd=tmp_path / "benchmarks",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 2 and run.stderr.startswith("notebooks.py: A cell failed: "), run.stderr
    assert "ZeroDivisionError" in run.stderr and not (tmp_path / "benchmarks" / "results").exists()


def test_programs_say_what_they_are_called_with():
    run = run_script("programs.py", "--help")
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr == "usage: python benchmarks/programs.py NAME CASE ENGINE FOLDER MICRO_BATCH_ROWS\n"
