"""Going on with a run: what its folder remembers, who may go on with it, and what is refused."""

import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from process_group import Group
from safetensors.torch import load_file, save_file

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


# ── The configuration that a run goes on with ────────────────────────────────────────────────────


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


def test_a_resume_that_is_refused_changes_no_configuration(tiny_config, tmp_path, monkeypatch):
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


# ── One run, one launch ──────────────────────────────────────────────────────────────────────────


def held_for(folder: Path) -> bool:
    """Whether another process holds the folder, as a second launch would see it."""
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        with lock:
            return False
    except TimeoutError:
        return True


@pytest.mark.parametrize("resume", [False, True], ids=["new", "resumed"])
def test_a_run_that_another_launch_is_making_is_refused(tiny_config, tmp_path, resume):
    """The second launch comes in the middle of the first, which is stopped there and killed at the end."""
    config = tiny_config(tmp_path, steps=1)
    if resume:
        quiet(config)
    folder = tmp_path / "run"

    def work(index: int) -> None:
        true = training.score

        def judged(*arguments, **options):
            (tmp_path / "there").write_text("")
            signal.pause()
            return true(*arguments, **options)

        training.score = judged
        quiet(config.with_changes(steps=2), resume=resume)

    group = Group(1, work, tmp_path)
    try:
        wait_for(tmp_path / "there", group)
        rows = (folder / "metrics.jsonl").read_bytes() if resume else None
        for again in (True, False):
            with pytest.raises(InputError, match=rf"^Another process is at work on the run in {folder}\. .*[.]$"):
                quiet(config.with_changes(steps=2), resume=again)
        second = Group(2, lambda index: quiet(config.with_changes(steps=2), resume=True), tmp_path / "second")
        assert second.wait() == [1, 1]
        assert "InputError: Another process is at work" in second.errors(0)
        assert "OtherProcessError: The first process has stopped; it says why." in second.errors(1)
        assert rows == ((folder / "metrics.jsonl").read_bytes() if resume else None)
    finally:
        os.kill(group.pids[0], signal.SIGKILL)
        group.wait()
    assert quiet(config.with_changes(steps=2), resume=True).completed  # the kill has let go of the folder


def wait_for(file: Path, group: Group) -> None:
    (file.parent / "second").mkdir()
    limit = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < limit and not group.errors(0), group.errors(0)
        time.sleep(0.02)


def test_the_folder_is_let_go_of_at_the_end_and_after_an_error(tiny_config, tmp_path, monkeypatch):
    config = tiny_config(tmp_path, steps=1)
    seen = []
    true = training.score

    def judged(*arguments, **options):
        seen.append(held_for(tmp_path / "run"))
        return true(*arguments, **options)

    monkeypatch.setattr(training, "score", judged)
    quiet(config)
    assert seen == [True] and not held_for(tmp_path / "run")

    def fails(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "score", fails)
    with pytest.raises(KeyboardInterrupt) as kept:  # as a notebook keeps its last error
        quiet(config.with_changes(steps=2), resume=True)
    assert kept and not held_for(tmp_path / "run")


# ── What a scheduler sees ────────────────────────────────────────────────────────────────────────


def test_a_quiet_run_that_was_stopped_says_so(tiny_config, tmp_path, command, monkeypatch):
    quiet(tiny_config(tmp_path, steps=1))
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        status, printed, _ = command("train", "--quiet", "--resume", tmp_path / "run", "--steps", 6)
    assert status == 130
    told = f"Stopped after step 3 of 6. To go on: tgpo-lab train --resume {tmp_path}/run\n"
    assert printed.startswith(told) and printed.count("Stopped") == 1
    status, printed, _ = command("train", "--quiet", "--resume", tmp_path / "run")
    assert status == 0 and "Stopped" not in printed


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
def test_a_run_killed_before_its_first_checkpoint_begins_again(tiny_config, tmp_path, command):
    config = tiny_config(tmp_path, steps=2)

    def work(index: int) -> None:
        training.save_checkpoint = lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL)
        quiet(config)

    assert Group(1, work, tmp_path).wait() == [-signal.SIGKILL]
    folder = tmp_path / "run"
    assert not (folder / "checkpoints").exists() and stored(folder)["config"]["steps"] == 2
    with pytest.raises(InputError, match=f"has no whole checkpoint.*tgpo-lab train --resume {folder}$"):
        load_run(folder)
    assert command("train", "--quiet", "--resume", folder)[0] == 0
    quiet(config.with_changes(output=str(tmp_path / "straight")))
    assert largest_difference(folder, tmp_path / "straight") == 0.0
    assert load_run(folder).metrics["step"].tolist() == [0, 1, 2]


def test_a_run_that_lost_its_checkpoints_does_not_begin_again(tiny_config, tmp_path, command):
    quiet(tiny_config(tmp_path, steps=1))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    status, _, error = command("train", "--quiet", "--resume", tmp_path / "run", "--steps", 2)
    assert status == 2 and "no whole checkpoint. Remove the folder" in error
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_fewer_steps_than_are_made_leave_nothing_to_do(tiny_config, tmp_path, command):
    folder = tmp_path / "run"
    quiet(tiny_config(tmp_path, steps=3))
    before = (folder / "config.json").read_bytes(), (folder / "metrics.jsonl").read_bytes()
    status, printed, error = command("train", "--resume", folder, "--steps", 1)
    assert (status, printed) == (2, "")
    assert error == (
        f"tgpo-lab: {folder} has made 3 steps, so steps=1 leaves nothing to do. To go on, give steps above 3.\n"
    )
    assert before == ((folder / "config.json").read_bytes(), (folder / "metrics.jsonl").read_bytes())
    status, printed, _ = command("train", "--resume", folder)  # as a scheduler may do with a finished run
    assert status == 0 and "All 3 steps are made. To go on, give steps above 3." in printed


# ── What may not change ──────────────────────────────────────────────────────────────────────────


def test_the_output_folder_is_not_named_among_what_may_change(tiny_config, tmp_path, command):
    quiet(tiny_config(tmp_path, steps=1))
    run = tmp_path / "run"
    _, _, error = command("train", "--resume", run, "--seed", 5)
    (listed,) = re.findall(r"\(only (.+) may change\)", error)
    assert "output" not in listed.split(", ") and "steps" in listed.split(", ")
    status, _, error = command("train", "--resume", run, "--output", tmp_path / "other")
    assert status == 2 and f"leave --output {tmp_path}/other out" in error and error.count("\n") == 1
    assert command("train", "--quiet", "--resume", run, "--output", run)[0] == 0  # the same folder is no change


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("change", ["an answer", "a prompt", "the order"])
def test_changed_prompts_are_refused(tiny_config, tmp_path, random_pair, split, change):
    prompts = Path(shutil.copytree(random_pair.prompts, tmp_path / "prompts"))
    config = tiny_config(tmp_path, dataset=str(prompts))
    quiet(config)
    file = prompts / f"{split}.jsonl"
    whole = file.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    if change == "an answer":
        rows[0]["answer"] = "8"
    elif change == "a prompt":
        rows[0]["prompt"] = "1+1+1+4="
    else:
        rows[:2] = rows[1::-1]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=rf"^{prompts} has other prompts or answers than when .* began"):
        quiet(config.with_changes(steps=4), resume=True)
    file.write_text(whole.replace('": "', '":    "'))  # the same in another dress
    assert quiet(config.with_changes(steps=4), resume=True).completed


def change_one_number(weights: Path, name: str) -> None:
    tensors = load_file(weights / "model.safetensors")
    tensors[name].view(-1)[0] += 1
    save_file(tensors, weights / "model.safetensors", {"format": "pt"})


def test_a_run_without_steps_begins_again_with_the_prompts_of_now(tiny_config, tmp_path, random_pair):
    prompts = Path(shutil.copytree(random_pair.prompts, tmp_path / "prompts"))
    config = tiny_config(tmp_path, dataset=str(prompts))
    quiet(config)
    before = stored(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    file = prompts / "train.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[::-1]))
    assert quiet(config, resume=True).completed
    after = stored(tmp_path / "run")
    assert after["digests"]["prompts"] != before["digests"]["prompts"] and after["id"] == before["id"]
    assert quiet(config.with_changes(steps=4), resume=True).completed  # and goes on with them


@pytest.mark.parametrize("change", ["chat template", "end tokens"])
def test_prompts_that_become_other_tokens_are_refused(tiny_config, tmp_path, random_pair, change):
    student = Path(shutil.copytree(random_pair.student, tmp_path / "student"))
    (student / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    config = tiny_config(tmp_path, student=str(student), chat_template=True)
    quiet(config)
    if change == "chat template":
        (student / "chat_template.jinja").write_text("{% for m in messages %}7{{ m['content'] }}{% endfor %}")
    else:
        (student / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    with pytest.raises(InputError, match=r"has other tokens, chat template or end tokens than when .* began"):
        quiet(config.with_changes(steps=4), resume=True)


def test_a_changed_teacher_is_refused(tiny_config, tmp_path, random_pair):
    teacher = Path(shutil.copytree(random_pair.teacher, tmp_path / "teacher"))
    config = tiny_config(tmp_path, teacher=str(teacher))
    quiet(config)
    moved = teacher.rename(tmp_path / "moved")
    teacher.symlink_to(moved)  # the same in another place
    assert quiet(config.with_changes(steps=4), resume=True).completed
    change_one_number(teacher, "model.norm.weight")
    with pytest.raises(InputError, match=rf"^{teacher} has other weights than when .* began"):
        quiet(config.with_changes(steps=5), resume=True)


def test_the_students_folder_may_change_but_not_under_adapters(tiny_config, tmp_path, random_pair):
    pytest.importorskip("peft")
    student = Path(shutil.copytree(random_pair.student, tmp_path / "student"))
    full = tiny_config(tmp_path, student=str(student))
    adapters = full.with_changes(lora_rank=2, output=str(tmp_path / "adapters"))
    quiet(full), quiet(adapters)
    change_one_number(student, "model.norm.weight")
    assert quiet(full.with_changes(steps=4), resume=True).completed  # the checkpoint has all of its weights
    with pytest.raises(InputError, match=rf"^{student} has other weights than when {tmp_path}/adapters began"):
        quiet(adapters.with_changes(steps=4), resume=True)


def test_paths_may_be_given_as_such(tiny_config, tmp_path, random_pair):
    text = tiny_config(tmp_path)
    paths = text.with_changes(student=Path(text.student), teacher=Path(text.teacher), output=Path(text.output),
                              dataset=Path(text.dataset))  # fmt: skip
    assert paths == text
    assert quiet(paths).completed and quiet(text.with_changes(steps=3), resume=True).completed


def test_a_run_of_an_earlier_version_goes_on(tiny_config, tmp_path):
    config = tiny_config(tmp_path, steps=1)
    quiet(config)
    file = tmp_path / "run" / "config.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in record.items() if k not in ("id", "digests")}))
    assert quiet(config.with_changes(steps=2), resume=True).completed
    assert stored(tmp_path / "run")["config"]["steps"] == 2
