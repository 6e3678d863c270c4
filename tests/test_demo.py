"""The demo on a random pair: what it makes, and that it goes on instead of starting again."""

import json
import shutil

import pytest

from tgpo_lab import demo as demo_module
from tgpo_lab.demo import run_demo
from tgpo_lab.errors import InputError
from tgpo_lab.runs import load_run
from tgpo_lab.training import train

PAIR, METHODS, STEPS = "random", ("rkl", "tgpo"), 2


@pytest.fixture(scope="module")
def shipped(random_pair, tmp_path_factory):
    """A data folder in which the random pair is a shipped one."""
    folder = tmp_path_factory.mktemp("data")
    entry = {key: str(getattr(random_pair, key)) for key in ("student", "teacher", "prompts")}
    (folder / "pairs" / PAIR).mkdir(parents=True)
    (folder / "pairs" / PAIR / "pair.json").write_text(json.dumps(entry))
    return folder


@pytest.fixture(autouse=True)
def only_the_random_pair(shipped, monkeypatch):
    monkeypatch.setattr("tgpo_lab.models.pairs.DATA", shipped)


@pytest.fixture(scope="module")
def finished(shipped, tmp_path_factory):
    """Folder of a finished demo. Read only: a test that changes it copies it first."""
    output = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tgpo_lab.models.pairs.DATA", shipped)
        assert run_demo(output, STEPS, 0, PAIR, METHODS) is not None
    return output


@pytest.fixture
def trained(monkeypatch):
    """What is trained in the demo: (method's folder, whether it was resumed)."""
    calls = []

    def recording(config, **options):
        calls.append((config.output.rsplit("/", 1)[1], options.get("resume", False)))
        return train(config, **options)

    monkeypatch.setattr(demo_module, "train", recording)
    return calls


def test_a_finished_demo_is_read_and_not_trained_again(finished, trained, capsys):
    result = run_demo(finished, STEPS, 0, PAIR, METHODS)
    assert trained == []
    assert list(result.runs) == list(result.table.index) == list(METHODS)
    assert result.table.attrs["accuracy"] == "test prompts"
    assert result.table["accuracy before"].nunique() == 1  # the same student at the start
    assert result.report == finished / "report.html"
    assert result.report.read_text(encoding="utf-8").count("After training</h5>") == 3 * len(METHODS)
    printed = capsys.readouterr().out
    assert str(result.report) in printed.replace("\n", "")
    assert all(method in printed for method in METHODS)


def test_all_methods_see_the_same_prompts_and_the_same_first_samples(finished):
    first = [load_run(finished / method).metrics.iloc[0] for method in METHODS]
    for column in ("accuracy", "reward", "length", "reverse_kl", "tokens"):
        assert first[0][column] == first[1][column]


def test_a_missing_run_is_made_and_an_unfinished_one_resumed(finished, tmp_path, trained):
    output = shutil.copytree(finished, tmp_path / "demo")
    shutil.rmtree(output / "tgpo")
    shutil.rmtree(output / "rkl" / "checkpoints" / f"step-{STEPS:06d}")
    result = run_demo(output, STEPS, 0, PAIR, METHODS)
    assert trained == [("rkl", True), ("tgpo", False)]
    for method in METHODS:
        again, before = result.runs[method].metrics, load_run(finished / method).metrics
        same = [column for column in again if not column.startswith("seconds_")]
        assert again[same].equals(before[same])


def test_a_run_killed_before_its_first_checkpoint_begins_again(finished, tmp_path, trained):
    output = shutil.copytree(finished, tmp_path / "demo")
    shutil.rmtree(output / "rkl" / "checkpoints")
    (output / "rkl" / "metrics.jsonl").unlink()
    result = run_demo(output, STEPS, 0, PAIR, METHODS)
    assert trained == [("rkl", True)]
    assert result.runs["rkl"].metrics["reward"].equals(load_run(finished / "rkl").metrics["reward"])


def test_a_run_killed_before_its_last_accuracy_gets_it(finished, tmp_path, trained):
    output = shutil.copytree(finished, tmp_path / "demo")
    metrics = output / "rkl" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:-1]))
    run_demo(output, STEPS, 0, PAIR, METHODS)
    assert trained == [("rkl", True)]
    assert json.loads(metrics.read_text().splitlines()[-1]) == json.loads(lines[-1])


@pytest.mark.parametrize(("steps", "seed", "named"), [(STEPS + 1, 0, "steps=2"), (STEPS, 1, "seed=0")])
def test_runs_of_another_demo_are_refused_before_anything_is_trained(finished, trained, steps, seed, named):
    with pytest.raises(InputError, match=f"holds a run with {named}.*Give another output folder"):
        run_demo(finished, steps, seed, PAIR, ("grpo", *METHODS))
    assert trained == []
    assert not (finished / "grpo").exists()


def test_ctrl_c_in_one_method_stops_the_demo_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def stopped(config, **options):
        run = train(config, **options)
        run.completed = config.output.endswith("rkl")
        return run

    monkeypatch.setattr(demo_module, "train", stopped)
    assert run_demo(tmp_path, STEPS, 0, PAIR, ("rkl", "tgpo", "grpo")) is None
    assert "stopped in tgpo" in capsys.readouterr().out
    assert not (tmp_path / "grpo").exists() and not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("methods", "pair", "message"),
    [
        ((), PAIR, "at least one"),
        (("rkl", "rkl"), PAIR, "without repeats"),
        (("alchemy",), PAIR, "Unknown method 'alchemy'"),
        (("rkl",), "nowhere", "Unknown pair 'nowhere'"),
    ],
)
def test_an_impossible_demo_is_refused(tmp_path, methods, pair, message):
    with pytest.raises(InputError, match=message):
        run_demo(tmp_path, STEPS, 0, pair, methods)
