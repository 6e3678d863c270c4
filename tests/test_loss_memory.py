"""The loss part of an update takes little memory beside that of whole logits, in processes of its own."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tgpo_lab.errors import InputError, RunError

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "loss_memory.py"
WIDTH, TOKENS, VOCABULARY = 256, 512, 16_384


def run_script(output, *arguments):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--vocabulary-size", str(VOCABULARY), "--student-width", str(WIDTH), "--teacher-width",
         str(WIDTH), "--repeats", "1", "--output", output, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text(encoding="utf-8"))["runs"], done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads the peak from Linux's /proc")
def test_the_loss_in_chunks_takes_a_fifth_of_the_memory_of_whole_logits_and_gives_its_gradient(tmp_path):
    output = tmp_path / "measured.json"
    (run,), _ = run_script(output, "--tokens", str(TOKENS))
    assert [comparison["loss"] for comparison in run["comparisons"]] == ["tgpo", "exact-rkl"]
    for comparison in run["comparisons"]:
        peaks = {version: entry["peak_bytes"] for version, entry in comparison["versions"].items()}
        assert peaks["plain"] > 4 * 8 * TOKENS * VOCABULARY  # at least one tensor of all logits in float32
        # The student's output layer gets its gradient; beside it there are a few tensors of one chunk. Blocks that were
        # freed and find no taker would be seen here: 0.45 once.
        assert peaks["chunks"] < 0.2 * peaks["plain"], (comparison["loss"], peaks)
        assert comparison["gradient_difference"] < 1e-5

    # Twice the positions: the chunks are as large as before, and hidden states need less than one tensor of the logits.
    (first, longer), printed = run_script(
        output, "--tokens", str(2 * TOKENS), "--versions", "chunks", "--losses", "tgpo"
    )
    assert first == run and longer["options"]["versions"] == ["chunks"]
    (many,) = longer["comparisons"]
    assert many["loss"] == "tgpo" and list(many["versions"]) == ["chunks"] and "gradient_difference" not in many
    few, many = (comparison["versions"]["chunks"]["peak_bytes"] for comparison in (run["comparisons"][0], many))
    assert many - few < 0.5 * 4 * 8 * TOKENS * VOCABULARY
    assert printed.count(f"GiB from the run at {TOKENS} tokens |") == 1


def test_tensors_larger_than_any_memory_did_not_fit(tmp_path):
    sizes = ("--vocabulary-size", "64", "--student-width", "8", "--teacher-width", "8", "--tokens", str(10**14))
    (run,), printed = run_script(tmp_path / "measured.json", *sizes, "--losses", "tgpo", "--versions", "plain")
    assert run["comparisons"] == [{"loss": "tgpo", "versions": {"plain": None}}]
    assert "| TGPO | plain | did not fit |" in printed


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmark is one of Linux")
def test_a_process_that_failed_otherwise_is_no_lack_of_memory(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    loss_memory = importlib.import_module("loss_memory")
    monkeypatch.setattr(loss_memory, "__file__", str(tmp_path / "child.py"))
    options = loss_memory.Options(versions=("chunks",))
    (tmp_path / "child.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert loss_memory.compare("tgpo", options) == {"loss": "tgpo", "versions": {"chunks": None}}
    (tmp_path / "child.py").write_text("import sys; sys.exit('No such file.')")
    with pytest.raises(RunError, match=r"^chunks, tgpo: ended with status 1:\s+No such file\."):
        loss_memory.compare("tgpo", options)


@pytest.mark.parametrize("sizes", [{"rows": 1}, {"vocabulary_size": 1}, {"repeats": 0}, {"tokens": 0}, {"rows": -2}])
def test_nothing_is_measured_of_too_little(monkeypatch, sizes):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    ((name, value),) = sizes.items()
    with pytest.raises(InputError, match=rf"^{name} must be \d or more, but is {value}\.$"):
        importlib.import_module("loss_memory").Options(**sizes)


# ── Several runs in one file, with numbers made up ───────────────────────────────────────────────


@pytest.fixture
def loss_runs(monkeypatch):
    """The script's neighbour, which it imports."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    yield importlib.import_module("loss_runs")
    sys.modules.pop("loss_runs")


def made_up(tokens, versions=("chunks", "plain"), gibibytes=1, **changes):
    entries = {version: {"seconds": [2.0, 8.0, 4.0], "peak_bytes": gibibytes << 30} for version in versions}
    options = {"vocabulary_size": 1000, "student_width": 16, "teacher_width": 32, "rows": 8, "tokens": tokens,
               "repeats": 3, "precision": "float32", "versions": list(versions)}  # fmt: skip
    return {
        "comparisons": [{"loss": "tgpo", "versions": entries}], "options": {**options, **changes}, "device": "CPU",
        "threads": 2, "versions": {"torch": "2.0"},
    }  # fmt: skip


def test_a_run_replaces_only_the_one_of_the_same_options_and_device(loss_runs):
    runs = []
    for run in (made_up(512), made_up(256), made_up(512, ["chunks"])):
        runs = loss_runs.with_run(runs, run)
    assert [run["options"]["tokens"] for run in runs] == [256, 512, 512]
    again = made_up(512, gibibytes=5)
    assert loss_runs.with_run(runs, again) == [runs[0], runs[2], again]
    assert len(loss_runs.with_run(runs, made_up(512, precision="bfloat16"))) == 4
    assert len(loss_runs.with_run(runs, {**again, "device": "H100"})) == 4


def test_what_was_not_measured_is_told_by_proportion_to_a_run_of_the_same_setting_alone(loss_runs):
    alone = made_up(4096, ["chunks"])
    others = [made_up(2048, gibibytes=99, rows=4), made_up(1024, gibibytes=99, student_width=64),
              {**made_up(512, gibibytes=99), "device": "H100"}]  # fmt: skip
    plain = "| {} | 8 × 4,096 | TGPO | plain | {} |  |  |  |"
    assert plain.format(4, "—") in loss_runs.table([*others, alone])
    failed = made_up(1024)
    failed["comparisons"][0]["versions"]["plain"] = None
    assert "| 1 | 8 × 1,024 | TGPO | plain | did not fit |  |  |  |" in loss_runs.table([failed])
    runs = [made_up(256, gibibytes=3), made_up(512, gibibytes=7, repeats=1), *others, alone, failed]
    # 7 GiB × 4,096 / 512: the run with the most tokens counts.
    assert plain.format(6, "—, by proportion 56.0 GiB from the run at 512 tokens") in loss_runs.table(runs)
    assert "| 6 | 8 × 4,096 | TGPO | in chunks | 1.00 GiB | 4.00 |  |  |" in loss_runs.table(runs)
    assert "| 1 | 8 × 256 | TGPO | in chunks | 3.00 GiB | 4.00 | 1.000 | 1.00 |" in loss_runs.table(runs)


@pytest.mark.parametrize("text", ["", "[]", '{"comparisons": []}'])
def test_another_file_is_not_overwritten(loss_runs, tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(InputError, match=r"other\.json holds no runs of this benchmark\. Give another --output"):
        loss_runs.earlier_runs(tmp_path / "other.json")
