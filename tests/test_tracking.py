"""What a run leaves for others to read: curves in trackers beside the JSON lines, and the model card."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate import Accelerator

from tgpo_lab.config import TrainConfig
from tgpo_lab.errors import InputError
from tgpo_lab.loop.model_card import model_card
from tgpo_lab.metrics import METRICS
from tgpo_lab.runs import latest_checkpoint
from tgpo_lab.training import train

ROOT = Path(__file__).resolve().parent.parent
STAND_INS = ROOT / "tests" / "stand_in_trackers"

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="needs the extra tensorboard"
)


# ── Trackers ─────────────────────────────────────────────────────────────────────────────────────


def scalars(folder) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    for file in folder.rglob("events.out*"):
        events = EventAccumulator(str(file))
        events.Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, {}).update({e.step: e.value for e in events.Scalars(name)})
    return found


@needs_tensorboard
def test_tensorboard_gets_the_rows_of_the_metrics_file(tiny_config, tmp_path):
    config = tiny_config(tmp_path, steps=2, trackers=("tensorboard",))
    train(config, show_progress=False)
    train(config.with_changes(steps=3), resume=True, show_progress=False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = scalars(tmp_path / "run" / "tensorboard")
    assert "reward" in found and set(found) <= set(METRICS)
    assert sorted(found["reward"]) == [0, 1, 2]
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "accuracy"):  # measured again at the end of a part
                assert found[name][row["step"]] == pytest.approx(value, rel=1e-5)


def tracked_training(config, folder, *changes, resume=False):
    """A training in a process of its own with the small wandb and trackio: how it ended, and what each received."""
    record = folder / "record.jsonl"
    paths = os.pathsep.join((str(STAND_INS), str(ROOT)))
    begun = [
        "--student", config.student, "--teacher", config.teacher, "--dataset", config.dataset, "--steps", "3",
        "--prompts-per-step", "2", "--group-size", "4", "--max-new-tokens", "12", "--evaluate-every", "2",
        "--evaluation-prompts", "4", "--output", folder / "run",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tgpo_lab", "train", "--quiet", "--trackers", "wandb", "trackio",
         *(["--resume", folder / "run"] if resume else begun), *changes],
        env={**os.environ, "PYTHONPATH": paths, "TRACKER_RECORD": str(record)}, capture_output=True, text=True,
    )  # fmt: skip
    received = {"wandb": [], "trackio": []}
    for line in record.read_text().splitlines():
        event = json.loads(line)
        received[event.pop("tracker")].append(event)
    return done, received


def test_weights_and_biases_and_trackio_get_configuration_rows_and_the_end(tiny_config, tmp_path):
    done, received = tracked_training(tiny_config(tmp_path), tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert [row.pop("step") for row in rows] == [0, 1, 2, 3]
    own = json.loads((tmp_path / "run" / "config.json").read_text())["id"]
    for tracker, known_by in (("wandb", {"name": "run", "id": own}), ("trackio", {"name": f"run-{own}"})):
        first = {"event": "init", "project": "tgpo-lab", **known_by, "resume": "allow"}
        assert received[tracker][0] == first
    for events in received.values():
        assert [event["event"] for event in events] == ["init", "config", *["log"] * 4, "finish"]
        assert [event["step"] for event in events[2:-1]] == [0, 1, 2, 3]
        assert [event["values"] for event in events[2:-1]] == rows
        settings = events[1]["values"]
        # What is no single value of JSON arrives as Python's text of it.
        arrived = {
            name: settings[name] if isinstance(value, bool | int | float | str) else ast.literal_eval(settings[name])
            for name, value in config.items()
        }
        assert arrived == config


def test_trackers_go_on_with_a_resumed_run_and_with_no_other_of_the_same_name(tiny_config, tmp_path):
    """Weights & Biases knows a run by its id, Trackio by its name (their documentation of ``init``)."""
    known_by = {"wandb": "id", "trackio": "name"}
    config = tiny_config(tmp_path, steps=1, output=str(tmp_path / "old" / "run"))
    train(config, show_progress=False)
    file = tmp_path / "old" / "run" / "config.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in record.items() if name != "id"}))  # an earlier version's
    for folder in ("new", "old"):
        (tmp_path / folder).mkdir(exist_ok=True)
        for steps in ("2", "3"):
            resume = folder == "old" or steps != "2"
            done, received = tracked_training(config, tmp_path / folder, "--steps", steps, resume=resume)
            assert done.returncode == 0, done.stderr
        for tracker, events in received.items():
            starts = [event for event in events if event["event"] == "init"]
            assert len(starts) == 2 and {event["resume"] for event in starts} == {"allow"}
            (known,) = {event[known_by[tracker]] for event in starts}
            (tmp_path / folder / tracker).write_text(known)
    for tracker in known_by:
        assert (tmp_path / "new" / tracker).read_text() != (tmp_path / "old" / tracker).read_text()


def test_trackers_are_told_the_end_of_a_run_that_an_error_stops(tiny_config, tmp_path):
    done, received = tracked_training(tiny_config(tmp_path), tmp_path, "--learning-rate", "1e30")
    assert done.returncode != 0 and "is not finite" in done.stderr
    (row,) = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert row.pop("step") == 0
    for events in received.values():
        assert [event["event"] for event in events] == ["init", "config", "log", "finish"]
        assert (events[2]["step"], events[2]["values"]) == (0, row)


def test_a_resumed_run_may_be_tracked_elsewhere(tiny_config, tmp_path):
    config = tiny_config(tmp_path, steps=1)
    assert not list((train(config, show_progress=False).directory).glob("tensorboard"))
    again = TrainConfig.from_dict(json.loads(json.dumps(config.as_dict())))
    assert again == config and again.trackers == ()


def test_trackers_are_checked_before_the_run(monkeypatch):
    with pytest.raises(InputError, match="Unknown tracker 'mlfow': choose from tensorboard, wandb, trackio"):
        TrainConfig(trackers=("mlfow",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="wandb is not installed: pip install wandb"):
        TrainConfig(trackers=("wandb",))


def test_a_tracker_that_cannot_be_imported_is_one_sentence(monkeypatch, tmp_path):
    (tmp_path / "trackio.py").write_text("import a_module_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(
        InputError, match=r"trackio is installed, but cannot be imported \(ModuleNotFoundError: No module"
    ):
        TrainConfig(trackers=("trackio",))


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed and goes first")
def test_a_folder_that_is_called_like_a_tracker_is_none(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()  # Python imports it as a package
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with pytest.raises(InputError, match=r"wandb is not installed: only a folder .* pip install wandb"):
            TrainConfig(trackers=("wandb",))
    finally:
        sys.modules.pop("wandb", None)


@needs_tensorboard
def test_a_tracker_that_does_not_start_leaves_a_run_to_go_on_with(monkeypatch, tiny_config, tmp_path):
    def no_login(*arguments, **options):
        raise RuntimeError("api_key not configured")

    config = tiny_config(tmp_path, steps=1, trackers=("tensorboard",))
    with monkeypatch.context() as patched:
        patched.setattr(Accelerator, "init_trackers", no_login)
        with pytest.raises(InputError, match=r"does not start \(RuntimeError: api_key not .* train --resume"):
            train(config, show_progress=False)
    run = train(config.with_changes(trackers=()), resume=True, show_progress=False)
    assert run.completed and len(run.metrics) == 2


# ── Model card ───────────────────────────────────────────────────────────────────────────────────


def test_every_checkpoint_has_a_card_with_its_own_numbers(tiny_config, tmp_path):
    run = train(
        tiny_config(tmp_path, method="kdrl", steps=4, keep_checkpoints=0, evaluate_every=1), show_progress=False
    )
    for step in (2, 4):
        card = (run.directory / "checkpoints" / f"step-{step:06d}" / "README.md").read_text()
        assert f"After {step} of 4 steps" in card
        table = dict(re.findall(r"^\| (\w+) \| .* \| (.+) \|$", card, re.MULTILINE))
        row = run.metrics.iloc[step - 1]
        for name in ("reward", "reverse_kl", "length", "agreement"):
            assert table[name] == f"{row[name]:.4g} (step {step - 1})"
    assert "kdrl" in card and run.config.student not in card  # no path of this machine
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["pipeline_tag"] == "text-generation" and metadata["library_name"] == "transformers"
    assert "base_model" not in metadata and "datasets" not in metadata


def test_the_card_names_what_is_on_the_hub():
    config = TrainConfig.preset("paper", "tgpo", dataset="openai/gsm8k", output="/somewhere/else")
    card = model_card(config, [{"step": 0, "reward": 0.25}, {"step": 7, "reward": 0.5}], 8)
    metadata = yaml.safe_load(card.split("---")[1])
    assert (metadata["base_model"], metadata["datasets"]) == ("Qwen/Qwen2.5-Math-7B", ["openai/gsm8k"])
    assert "teacher Qwen/Qwen3-30B-A3B" in card and "| reward | 0.25 (step 0) | 0.5 (step 7) |" in card
    assert "Nothing was measured yet." in model_card(config, [], 0) and "/somewhere" not in card


def test_the_card_is_missed_when_it_is_cut(tiny_config, tmp_path):
    run = train(tiny_config(tmp_path, steps=1), show_progress=False)
    card = latest_checkpoint(run.directory) / "README.md"
    card.write_text(card.read_text()[:-1])
    with pytest.raises(InputError, match=r"README\.md has \d+ bytes where"):
        latest_checkpoint(run.directory)
