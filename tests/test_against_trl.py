"""The comparison with TRL's trainers, with programs that say what they are told to instead of taking steps."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import against_trl
from against_trl import Options, compare, fastest, steps_of
from programs import DISTILLATION, GRPO, LOOP, LOOP_MEASURING
from trl_tables import tables

from tgpo_lab.benchmark_cases import CASES
from tgpo_lab.random_pair import write_random_pair

# Takes 8 + (rows − 2)² seconds with as many rows at once, so 2 are the best; and what the folder says to go wrong does.
STAND_IN = """
import json, os, sys
from pathlib import Path
name, case, engine, folder, rows = sys.argv[1:]
rows, log, wrong = int(rows), Path(folder, "log"), json.loads(Path(folder, "wrong").read_text())
print("begins", name, file=log.open("a"))
for line in sys.stdin:
    if rows >= wrong.get(name, 99):
        sys.exit(wrong["says"]) if wrong["says"] else os.kill(os.getpid(), 9)
    print("other output")
    seconds = 4.0 if name == "tgpo_lab" else 8.0 + (rows - 2) ** 2
    print("RESULT", json.dumps({"seconds": seconds, "processor_seconds": 2.0, "peak_resident_bytes": 3 * 2**30,
                                "peak_gpu_bytes": None}), flush=True)
print("ends", name, file=log.open("a"))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "programs.py").write_text(STAND_IN)
    (tmp_path / "wrong").write_text("{}")
    monkeypatch.setattr(against_trl, "PROGRAMS", tmp_path / "programs.py")
    return tmp_path


def test_the_fastest_micro_batch_is_taken_of_those_that_fit(folder):
    arguments = (GRPO, "real-small", "default", folder, Options(trial_rounds=1))
    assert fastest(*arguments) == 2
    for says in ("CUDA out of memory.", ""):  # Linux kills without a word
        for first_too_large, expected in ((2, 1), (1, None)):
            (folder / "wrong").write_text(json.dumps({GRPO: first_too_large, "says": says}))
            assert fastest(*arguments) == expected
    (folder / "wrong").write_text(json.dumps({GRPO: 2, "says": "No such file."}))
    with pytest.raises(RuntimeError, match=r"TRL GRPOTrainer ended with status 1:\s+No such file\."):
        fastest(*arguments)


def test_a_round_gives_one_ratio_and_what_does_not_fit_is_said(folder):
    (folder / "wrong").write_text(json.dumps({DISTILLATION: 1, "says": "CUDA out of memory."}))
    options = Options(rounds=2, warmup_rounds=1, trial_rounds=1)
    found = compare("real-small", "default", folder, options)
    assert list(found["programs"]) == [LOOP, LOOP_MEASURING, GRPO, DISTILLATION]
    assert found["programs"][DISTILLATION] is None
    grpo = found["programs"][GRPO]
    assert grpo["micro_batch_rows"] == 2
    assert grpo["ratio_of_seconds"] == {"median": 2.0, "min": 2.0, "max": 2.0}
    result = {
        "comparisons": [found], "alone": [], "rounds": 2, "engine": "own", "note": "shared machine", "trl": "1",
        "versions": {"torch": "2", "transformers": "5"}, "device": "CPU", "threads": 2,
    }  # fmt: skip
    said = tables(result)
    assert f"| real-small | default | {GRPO} | 2 rows | 8.00 (8.00–8.00) | 2.00 (2.00–2.00) | 3.0 GiB |" in said
    assert f"| real-small | default | {LOOP} | 192 tokens | 4.00 (4.00–4.00) | 1.00 (1.00–1.00) | 3.0 GiB |" in said
    assert f"{DISTILLATION} | did not fit |" in said
    assert "shared machine." in said


@pytest.mark.parametrize(
    ("options", "case", "expected"),
    [
        (Options(trainers=()), "real-small", ["begins", "begins", "ends", "ends"]),
        (Options(trainers=(), turns="program"), "real-small", ["begins", "ends", "begins", "ends"]),
        (Options(trainers=()), "real-0.5b", ["begins", "ends", "begins", "ends"]),
    ],
)
def test_programs_are_in_memory_together_or_one_after_the_other(folder, options, case, expected):
    compare(case, "default", folder, options)
    assert [line.split()[0] for line in (folder / "log").read_text().splitlines()] == expected


def test_trl_takes_a_step_of_a_real_case_when_told_to(tmp_path):
    pytest.importorskip("trl", reason="needs the extra trl")
    write_random_pair(CASES["real-small"].pair, tmp_path, precision="bfloat16")
    taken = steps_of({GRPO: 4}, "real-small", "default", tmp_path, Options(rounds=1, warmup_rounds=0))
    (step,) = taken[GRPO]
    assert step["seconds"] > 0
    assert step["peak_resident_bytes"] > 2**27


def test_the_loop_takes_steps_of_a_real_case_when_told_to(tmp_path):
    case = CASES["real-small"]
    write_random_pair(case.pair, tmp_path, precision="bfloat16")
    taken = steps_of({LOOP: 0}, "real-small", "default", tmp_path, Options(rounds=1, warmup_rounds=1))
    assert list(taken) == [LOOP]
    assert len(taken[LOOP]) == 1
    assert taken[LOOP][0]["seconds"] > 0
    assert taken[LOOP][0]["peak_resident_bytes"] > 2**27
    config = json.loads(next(tmp_path.glob("run-*/config.json")).read_text())["config"]
    assert (config["precision"], config["gradient_checkpointing"]) == ("bfloat16", True)
