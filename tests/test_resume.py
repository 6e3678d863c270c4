"""Going on with a run: what its folder remembers, who may go on with it, and what is refused."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from process_group import Group
from safetensors.torch import load_file

from tgpo_lab import training
from tgpo_lab.checkpoints import read_state
from tgpo_lab.errors import InputError
from tgpo_lab.loop import preparation
from tgpo_lab.runs import latest_checkpoint, load_run, read_config
from tgpo_lab.training import train


def quiet(config, **options):
    return train(config, show_progress=False, **options)


def stored(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def largest_difference(one: Path, other: Path) -> float:
    first, second = (load_file(latest_checkpoint(folder) / "model.safetensors") for folder in (one, other))
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def stop_after(steps: int, monkeypatch) -> None:
    """The run of this process gets a SIGTERM in its step number ``steps``."""
    true, calls = training.score, []

    def judged(*arguments, **options):
        calls.append(1)
        if len(calls) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return true(*arguments, **options)

    monkeypatch.setattr(training, "score", judged)


def test_the_printed_command_goes_on_with_a_run_that_a_resume_made_longer(tiny_config, tmp_path, command, monkeypatch):
    folder = tmp_path / "run"
    config = tiny_config(tmp_path, steps=2, checkpoint_every=100)
    quiet(config)
    first = stored(folder)
    with monkeypatch.context() as patched:
        stop_after(1, patched)
        status, printed, _ = command("train", "--resume", folder, "--steps", 5, "--micro-batch-tokens", 512)
    assert status == 130
    (words,) = re.findall(r"Stopped after step 3 of 5\. To go on: tgpo-lab (.+)\n", printed)
    assert not load_run(folder).completed

    status, printed, error = command(*words.split())
    assert (status, error) == (0, "") and "step 5/5" in printed
    assert read_state(latest_checkpoint(folder)).step == 5 and load_run(folder).completed
    quiet(config.with_changes(steps=5, micro_batch_tokens=512, output=str(tmp_path / "straight")))
    assert largest_difference(folder, tmp_path / "straight") < 1e-5  # rounding, of other micro-batches
    # The first configuration can still be told, and by which command the run was made.
    assert read_config(folder) == config.with_changes(steps=5, micro_batch_tokens=512)
    (change,) = stored(folder)["changes"]
    assert (change["step"], change["before"]) == (2, {"steps": 2, "micro_batch_tokens": config.micro_batch_tokens})
    assert change["command"] and change["versions"] and change["time"]
    for name in ("command", "versions", "time"):
        assert stored(folder)[name] == first[name]


def test_a_resume_is_refused_changes_no_configuration(tiny_config, tmp_path, monkeypatch):
    config = tiny_config(tmp_path, steps=2)
    quiet(config)
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(InputError, match="learning_rate"):
        quiet(config.with_changes(steps=4, learning_rate=1.0), resume=True)

    def refuses(*arguments):
        raise InputError("no such engine here")

    monkeypatch.setattr(preparation, "make_engine", refuses)  # the last check of all
    with pytest.raises(InputError, match="no such engine here"):
        quiet(config.with_changes(steps=4), resume=True)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_resume_with_the_same_configuration_writes_none(tiny_config, tmp_path):
    config = tiny_config(tmp_path, steps=2)
    quiet(config)
    before = (tmp_path / "run" / "config.json").read_bytes()
    quiet(config, resume=True)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    quiet(config.with_changes(output=str(tmp_path / "moved")), resume=True)  # a folder that moved is no change
    assert (tmp_path / "moved" / "config.json").read_bytes() == before


def test_one_of_several_processes_writes_the_changed_configuration(tiny_config, tmp_path):
    config = tiny_config(tmp_path, steps=1)
    quiet(config)
    group = Group(2, lambda index: quiet(config.with_changes(steps=2), resume=True), tmp_path)
    assert group.wait() == [0, 0], (group.errors(0), group.errors(1))
    assert len(stored(tmp_path / "run")["changes"]) == 1 and read_config(tmp_path / "run").steps == 2
