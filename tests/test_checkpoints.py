"""Files and checkpoints: whole or not there at all, and given back bit for bit."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tgpo_lab.checkpoints import (
    CheckpointState,
    checkpoint_folders,
    load_optimizer,
    optimizer_tensors,
    read_state,
    save_checkpoint,
)
from tgpo_lab.errors import InputError
from tgpo_lab.files import require_writable_folder, write_json, write_text, written_folder
from tgpo_lab.models.pairs import load_model, load_tokenizer
from tgpo_lab.runs import latest_checkpoint
from tgpo_lab.schedules import UntilAgreement


def names(folder) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# ── Files ────────────────────────────────────────────────────────────────────────────────────────


def test_a_text_is_written_in_place_of_the_old_one(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "old")
    write_text(file, "πθ ‖ πT\n")
    assert file.read_text(encoding="utf-8") == "πθ ‖ πT\n"
    write_json(file, {"a": [1, 2.5, None], "ß": "‖"})
    assert json.loads(file.read_text(encoding="utf-8")) == {"a": [1, 2.5, None], "ß": "‖"}
    assert names(tmp_path) == ["a.txt"]


def test_a_text_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "x" * 100_000 + "\ud800")  # half a surrogate pair: UTF-8 has no bytes for it
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert file.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_takes_the_place_of_the_old_one(tmp_path):
    target = tmp_path / "deep" / "folder"
    for text in ("old", "new"):
        with written_folder(target) as writing:
            assert writing != target
            (writing / f"{text}.txt").write_text(text)
            (writing / "below").mkdir()
            assert not (target / f"{text}.txt").exists()  # not before it is whole
    assert names(target) == ["below", "new.txt"]
    assert names(tmp_path / "deep") == ["folder", "folder/below", "folder/new.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_folder_that_is_not_finished_leaves_the_old_one_and_nothing_else(tmp_path, error):
    target = tmp_path / "folder"
    with written_folder(target) as writing:
        (writing / "old.txt").write_text("old")
    with pytest.raises(error), written_folder(target) as writing:
        (writing / "new.txt").write_text("new")
        raise error("in the middle")
    assert names(tmp_path) == ["folder", "folder/old.txt"]


def test_a_folder_that_can_be_written_is_left_empty(tmp_path):
    assert require_writable_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert names(tmp_path) == ["a", "a/b"]
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=str(path)):
            require_writable_folder(path)


# ── Checkpoints ──────────────────────────────────────────────────────────────────────────────────


class Learner:
    """A student with an optimiser, and a made-up loss to learn from."""

    def __init__(self, folder, learning_rate: float = 1e-2):
        self.student = load_model(folder, torch.float32, "cpu")
        self.tokenizer = load_tokenizer(folder)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), learning_rate, (0.8, 0.99), weight_decay=0.1)

    def learn(self, steps: int) -> None:
        tokens = torch.arange(40).view(4, 10)
        for step in range(steps):
            self.optimizer.zero_grad()
            self.student(tokens, labels=tokens + step).loss.backward()
            self.optimizer.step()

    def save(self, folder, step: int, keep: int = 0, schedule: dict | None = None):
        state = CheckpointState(step, schedule or {})
        moments = optimizer_tensors(self.student, self.optimizer)
        return save_checkpoint(folder, state, self.student, self.tokenizer, moments, keep)

    def weights(self) -> dict[str, torch.Tensor]:
        return self.student.state_dict()

    def moments(self) -> dict[str, torch.Tensor]:
        return {
            f"{name} {key}": value
            for name, parameter in self.student.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("role", ["student", "teacher"])  # Llama and Qwen3
@pytest.mark.parametrize("steps", [0, 3])
def test_weights_and_optimizer_come_back_bit_for_bit(random_pair, tmp_path, role, steps):
    learner = Learner(getattr(random_pair, role))
    learner.learn(steps)
    checkpoint = learner.save(tmp_path, steps)
    assert checkpoint == tmp_path / f"step-{steps:06d}"

    other = Learner(checkpoint)
    assert_equal(other.weights(), learner.weights())
    load_optimizer(checkpoint, other.student, other.optimizer)
    if steps:
        moments = learner.moments()
        assert any(bool(m.any()) for name, m in moments.items() if name.endswith("exp_avg_sq"))
        assert len(moments) == 3 * len(list(learner.student.parameters()))
        assert_equal(other.moments(), moments)

    for either in (learner, other):
        either.learn(2)
    assert_equal(other.weights(), learner.weights())
    assert_equal(other.moments(), learner.moments())


def test_without_the_optimizer_state_learning_goes_another_way(random_pair, tmp_path):
    # So the test above cannot pass by chance.
    learner = Learner(random_pair.student)
    learner.learn(3)
    other = Learner(learner.save(tmp_path, 3))
    for either in (learner, other):
        either.learn(2)
    assert not torch.equal(other.weights()["lm_head.weight"], learner.weights()["lm_head.weight"])


def test_a_checkpoint_is_an_ordinary_folder_of_transformers(random_pair, tmp_path, tokenizer):
    learner = Learner(random_pair.student)
    learner.learn(1)
    checkpoint = learner.save(tmp_path, 1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert_equal(model.state_dict(), learner.weights())
    text = "47+85=<think> ones 7+5=12 write 2 carry 1;</think> #132"
    assert AutoTokenizer.from_pretrained(checkpoint).encode(text) == tokenizer.encode(text)
    assert not [p for p in checkpoint.rglob("*") if p.suffix in {".bin", ".pt", ".pkl", ".pth"}]  # no pickles


def test_the_state_of_a_schedule_comes_back(random_pair, tmp_path):
    schedule = UntilAgreement(0.5, agreement=0.9, patience=2, ramp=4)
    for step, agreement in enumerate((0.5, 0.95, 0.95)):
        schedule.observe(step, agreement)
    state = read_state(Learner(random_pair.student).save(tmp_path, 3, schedule=schedule.state()))
    assert state == CheckpointState(3, schedule.state())
    again = UntilAgreement(0.5, agreement=0.9, patience=2, ramp=4)
    again.load_state(state.schedule)
    assert [again(step) for step in range(8)] == [schedule(step) for step in range(8)]
    assert again(4) < 0.5  # it has begun to fall


@pytest.mark.parametrize("keep, kept", [(0, [0, 2, 4, 6, 8, 10]), (1, [10]), (2, [8, 10]), (9, [0, 2, 4, 6, 8, 10])])
def test_the_latest_checkpoints_are_kept(random_pair, tmp_path, keep, kept):
    learner = Learner(random_pair.student)
    for step in range(0, 11, 2):
        learner.save(tmp_path, step, keep)
        assert read_state(checkpoint_folders(tmp_path)[-1]).step == step
    assert [p.name for p in checkpoint_folders(tmp_path)] == [f"step-{step:06d}" for step in kept]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{step:06d}" for step in kept]


def test_the_latest_is_the_one_with_the_highest_number(random_pair, tmp_path):
    learner = Learner(random_pair.student)
    for step in (999_999, 1_000_000):
        learner.save(tmp_path, step, keep=1)
    assert [read_state(p).step for p in checkpoint_folders(tmp_path)] == [1_000_000]


@pytest.mark.parametrize("copy", ["step-000009-best", "step-000009 (copy)", "step-", "step-²"])
def test_a_copy_that_someone_keeps_beside_the_checkpoints_is_none_of_them(random_pair, tmp_path, copy):
    learner = Learner(random_pair.student)
    checkpoint = learner.save(tmp_path, 1)
    shutil.copytree(checkpoint, tmp_path / copy)
    assert checkpoint_folders(tmp_path) == [checkpoint]
    learner.save(tmp_path, 2, keep=1)
    assert names(tmp_path)[0].startswith("step-") and (tmp_path / copy / "state.json").exists()


def test_a_checkpoint_can_be_written_again(random_pair, tmp_path):
    learner = Learner(random_pair.student)
    learner.save(tmp_path, 2)
    learner.learn(1)
    assert_equal(Learner(learner.save(tmp_path, 2)).weights(), learner.weights())
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]


def test_a_process_killed_half_way_leaves_the_checkpoint_before(random_pair, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    learner = Learner(random_pair.student)
    learner.learn(1)
    learner.save(checkpoints, 2, keep=1)
    before = {name: tensor.clone() for name, tensor in learner.weights().items()}

    child = os.fork()
    if child == 0:  # dies in the middle of the second checkpoint, without a chance to tidy up

        def die(*_) -> None:
            os._exit(9)

        learner.tokenizer.save_pretrained = die
        learner.save(checkpoints, 4, keep=1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9

    assert sorted(p.name for p in checkpoints.iterdir()) == [".step-000004.writing", "step-000002"]
    assert (checkpoints / ".step-000004.writing" / "model.safetensors").exists()
    assert [p.name for p in checkpoint_folders(checkpoints)] == ["step-000002"]
    assert latest_checkpoint(tmp_path) == checkpoints / "step-000002"
    assert_equal(Learner(checkpoints / "step-000002").weights(), before)

    (checkpoints / ".step-000004.writing" / "left-over.txt").write_text("")
    learner.save(checkpoints, 4, keep=1)  # the resumed run comes to the same step again
    assert [p.name for p in checkpoints.iterdir()] == ["step-000004"]
    assert not (checkpoints / "step-000004" / "left-over.txt").exists()


def test_even_a_half_written_folder_with_all_its_files_is_no_checkpoint(random_pair, tmp_path):
    checkpoint = Learner(random_pair.student).save(tmp_path / "checkpoints", 2)
    shutil.copytree(checkpoint, checkpoint.parent / ".step-000004.writing")
    assert latest_checkpoint(tmp_path) == checkpoint


def test_there_is_no_checkpoint(tmp_path):
    assert checkpoint_folders(tmp_path / "none") == []
    with pytest.raises(InputError, match="no whole checkpoint"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "config.json", "tokenizer.json"])
def test_every_file_is_missed_when_it_is_missing_or_cut(random_pair, tmp_path, name):
    learner = Learner(random_pair.student)
    learner.learn(1)
    file = learner.save(tmp_path, 1) / name
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole + b" ", b""):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=rf"{name} has {len(damaged)} bytes where {len(whole)} were written"):
            read_state(file.parent)
    file.unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        read_state(file.parent)
    file.write_bytes(whole)
    assert read_state(file.parent).step == 1


@pytest.mark.parametrize("damage", ["other shape", "other names", "cut", "missing"])
def test_an_optimizer_file_that_does_not_belong_to_the_model(random_pair, tmp_path, damage):
    learner = Learner(random_pair.student)
    learner.learn(1)
    checkpoint = learner.save(tmp_path, 1)
    file = checkpoint / "optimizer.safetensors"
    tensors = load_file(file)
    if damage == "other shape":
        tensors["exp_avg|model.norm.weight"] = tensors["exp_avg|model.norm.weight"][:5].clone()
    elif damage == "other names":
        tensors = {f"{name}.elsewhere": tensor for name, tensor in tensors.items()}
    save_file(tensors, file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "missing":
        file.unlink()
    other = Learner(checkpoint)
    with pytest.raises(InputError, match=r"optimizer.safetensors"):
        load_optimizer(checkpoint, other.student, other.optimizer)
