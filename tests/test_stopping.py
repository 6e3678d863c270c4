"""Memory or disk that is full, and a scheduler's signal: caused for real, in processes whose limits are lowered."""

import contextlib
import errno
import gc
import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from process_group import Group
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tgpo_lab import training
from tgpo_lab.allocation_errors import is_out_of_memory
from tgpo_lab.checkpoints import checkpoint_folders, read_state
from tgpo_lab.cli import main
from tgpo_lab.doctor.diagnose import diagnose
from tgpo_lab.errors import InputError
from tgpo_lab.loop.measurement import StepMeasurement
from tgpo_lab.loop.out_of_memory import OutOfMemoryError
from tgpo_lab.models import pairs
from tgpo_lab.runs import latest_checkpoint
from tgpo_lab.training import train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and of files are Linux's")


def quiet(config, **options):
    return train(config, show_progress=False, **options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(latest_checkpoint(folder) / "model.safetensors")


def largest_difference(one: Path, other: Path) -> float:
    first, second = weights(one), weights(other)
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def at_step(number: int, action) -> None:
    """Do something between sampling and the teacher's pass of a step, in this process."""
    true, calls = training.score, []

    def judged(*args, **options):
        calls.append(1)
        if len(calls) == number + 1:
            action()
        return true(*args, **options)

    training.score = judged


# ── Memory ───────────────────────────────────────────────────────────────────────────────────────


BALLAST = []


def leave_memory(megabytes: int) -> None:
    """Let this process take so much more memory and no more: what it had freed and kept is filled first."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    lower(resource.RLIMIT_AS, size)
    for block in (2**22, 2**20, 2**18):
        with contextlib.suppress(RuntimeError):
            while True:
                BALLAST.append(torch.empty(block, dtype=torch.uint8))
    lower(resource.RLIMIT_AS, size + megabytes * 2**20)


def give_memory_back_when_collecting() -> None:
    """The next collection of garbage ends the shortage: what half a pass needs is not the same everywhere."""
    true = gc.collect

    def collect(*args):
        lower(resource.RLIMIT_AS, resource.getrlimit(resource.RLIMIT_AS)[1])
        BALLAST.clear()
        return true(*args)

    gc.collect = collect


def lower(limit: int, value: int) -> None:
    resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))


@pytest.fixture
def large_config(tiny_config, tmp_path):
    """2048 responses, which need more than 220 MB in one micro-batch and less than 100 MB in four."""
    return tiny_config(tmp_path, steps=1, prompts_per_step=8, group_size=256, micro_batch_tokens=100_000,
                       evaluate_every=0, gradient_terms_every=1, max_gradient_norm=1e6)  # fmt: skip


def test_out_of_memory_halves_the_micro_batches_and_changes_nothing_but_rounding(large_config, tmp_path):
    def work(index: int) -> None:
        sys.stderr = (tmp_path / "told").open("w", buffering=1)
        at_step(0, lambda: leave_memory(160))
        quiet(large_config)

    group = Group(1, work, tmp_path)
    assert group.wait() == [0], group.errors(0)
    told = (tmp_path / "told").read_text()
    assert told.count("Going on with micro-batches of") in (1, 2) and "out of memory (" in told
    whole = quiet(large_config.with_changes(output=str(tmp_path / "whole"))).metrics.iloc[0]
    parts = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    for name in ("kl_sampled", "rejected", "reverse_kl", "gradient_norm", "gradient_norm_teacher", "loss_teacher"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4), name  # nothing is counted twice
    assert largest_difference(tmp_path / "run", tmp_path / "whole") < 1e-4


def test_what_was_counted_before_memory_ran_out_is_not_counted_again(tiny_config, tmp_path, monkeypatch, capsys):
    """It runs out at the second of three chunks: the first has left its gradient and measurements behind."""
    config = tiny_config(tmp_path, steps=1, micro_batch_tokens=60, measured_positions=0, max_gradient_norm=1e6)
    whole = quiet(config.with_changes(output=str(tmp_path / "whole"))).metrics.iloc[0]
    true, calls = StepMeasurement.add, []

    def add(self, positions) -> None:
        calls.append(1)
        true(self, positions)
        if len(calls) == 2:
            torch.empty(2**60)

    monkeypatch.setattr(StepMeasurement, "add", add)
    again = quiet(config).metrics.iloc[0]
    assert "Going on with micro-batches of 30 tokens" in capsys.readouterr().err
    for name in ("kl_sampled", "rejected", "positive_signal", "reverse_kl", "entropy", "gradient_norm", "loss_teacher"):
        assert again[name] == pytest.approx(whole[name], rel=1e-4), name


def test_out_of_memory_in_one_process_halves_those_of_both(large_config, tmp_path):
    def work(index: int) -> None:
        sys.stderr = (tmp_path / f"told-{index}").open("w", buffering=1)
        if index:
            at_step(0, lambda: leave_memory(6))
            give_memory_back_when_collecting()
        quiet(large_config)

    group = Group(2, work, tmp_path)
    assert group.wait() == [0, 0], (group.errors(0), group.errors(1))
    assert "out of memory (in another process)" in (tmp_path / "told-0").read_text()
    assert "Going on" not in (tmp_path / "told-1").read_text()
    quiet(large_config.with_changes(output=str(tmp_path / "whole")))
    assert largest_difference(tmp_path / "run", tmp_path / "whole") < 1e-4


def test_out_of_memory_in_a_quarter_stops_with_what_to_lower_and_a_resume_may_lower_it(large_config, tmp_path):
    group = Group(1, lambda index: (at_step(0, lambda: leave_memory(6)), quiet(large_config)), tmp_path)
    assert group.wait() == [1]
    assert "OutOfMemoryError: Out of memory in micro-batches of" in group.errors(0)
    assert "Lower micro_batch_tokens" in group.errors(0)
    assert read_state(latest_checkpoint(tmp_path / "run")).step == 0
    assert quiet(large_config.with_changes(micro_batch_tokens=4096), resume=True).completed


@pytest.mark.parametrize("command", ["train", "doctor"])
def test_out_of_memory_while_loading_is_one_sentence(large_config, tmp_path, command):
    tokenizer = AutoTokenizer.from_pretrained(large_config.student)
    size = {"hidden_size": 1024, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    big = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **size))  # 33 MB
    big.save_pretrained(tmp_path / "big")
    tokenizer.save_pretrained(tmp_path / "big")
    large_config = large_config.with_changes(student=str(tmp_path / "big"))

    def work(index: int) -> None:
        true = pairs.load_model

        def limited(*args, **options):
            leave_memory(16)  # for Python itself
            return true(*args, **options)

        pairs.load_model = limited
        if command == "train":
            quiet(large_config)
        else:
            (finding,) = [f for f in diagnose(large_config, device="cpu").findings if f.level == "refused"]
            raise InputError(finding.text)

    group = Group(1, work, tmp_path)
    assert group.wait() == [1]
    assert "Out of memory while student and teacher were loaded (" in group.errors(0), group.errors(0)
    assert "teacher_offload or teacher_server" in group.errors(0) and not (tmp_path / "run").exists()


def test_out_of_memory_elsewhere_names_what_sampling_needs(large_config, tmp_path):
    def work(index: int) -> None:
        true = training.sample_divided

        def limited(*args, **options):
            leave_memory(6)
            return true(*args, **options)

        training.sample_divided = limited
        quiet(large_config)

    group = Group(1, work, tmp_path)
    assert group.wait() == [1]
    assert "Let fewer responses be written at once (sampling_rows); or lower prompts_per_step" in group.errors(0)


@pytest.mark.parametrize(
    "changes, advice",
    [
        ({}, "Let fewer responses be written at once (sampling_rows); or lower prompts_per_step, group_size or "
         "max_new_tokens, which decide what sampling needs."),
        ({"compile_decoding": True}, "Set compile_decoding to false, whose buffers stay all the time; or let fewer "
         "responses be written at once (sampling_rows); or lower prompts_per_step"),
        ({"engine": "vllm", "vllm_memory_share": 0.25}, "Lower vllm_memory_share (0.25), the part of the memory that "
         "vLLM takes; or set vllm_sleep, so that it gives that part back while the student learns; or lower "
         "prompts_per_step, group_size or max_new_tokens, which decide how large a step is."),
        ({"engine": "vllm", "vllm_sleep": True}, "Lower vllm_memory_share (0.3), the part of the memory that vLLM "
         "takes; or lower prompts_per_step"),
        # The teacher writes here whatever the student's engine is.
        ({"engine": "vllm", "vllm_sleep": True, "method": "sft"}, "that vLLM takes; or let fewer of the teacher's "
         "responses be written at once (sampling_rows); or lower"),
    ],
)  # fmt: skip
def test_what_helps_against_memory_that_ran_out_elsewhere_is_what_the_engine_heeds(
    tiny_config, tmp_path, vllm, untied_student, monkeypatch, changes, advice
):
    monkeypatch.setattr(torch, "compile", lambda read, **options: read)
    monkeypatch.setattr(training, "score", lambda *arguments, **options: torch.empty(2**60))
    with pytest.raises(OutOfMemoryError, match=r"^Out of memory \(") as error:
        quiet(tiny_config(tmp_path, student=str(untied_student), **changes))
    assert advice in str(error.value)
    assert ("sampling_rows" in str(error.value)) == ("sampling_rows" in advice)


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


# ── Disk ─────────────────────────────────────────────────────────────────────────────────────────


def no_file_above(size: int) -> None:
    lower(resource.RLIMIT_FSIZE, size)


def test_a_checkpoint_that_finds_no_room_leaves_the_one_before_and_the_run_goes_on(tiny_config, tmp_path):
    config = tiny_config(tmp_path, steps=4, checkpoint_every=1)
    group = Group(1, lambda index: (at_step(1, lambda: no_file_above(100_000)), quiet(config)), tmp_path)
    assert group.wait() == [1]
    folder = tmp_path / "run"
    assert "DiskFullError: A file of the run could not be written (" in group.errors(0)
    assert (
        f"The last whole checkpoint is {folder}/checkpoints/step-000001. Make room, then go on: tgpo-lab train "
        f"--resume {folder}" in group.errors(0)
    )
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-000000", "step-000001"]
    quiet(config, resume=True)
    quiet(config.with_changes(output=str(tmp_path / "straight")))
    assert largest_difference(folder, tmp_path / "straight") == 0.0


def test_metrics_that_find_no_room_are_cut_short_and_the_run_goes_on(tiny_config, tmp_path):
    config = tiny_config(tmp_path, steps=4, checkpoint_every=1)
    file = tmp_path / "run" / "metrics.jsonl"
    group = Group(
        1, lambda index: (at_step(2, lambda: no_file_above(file.stat().st_size + 50)), quiet(config)), tmp_path
    )
    assert group.wait() == [1]
    assert "DiskFullError" in group.errors(0) and "step-000002. Make room" in group.errors(0)
    assert len(file.read_text().splitlines()[2]) == 50  # part of a row
    assert quiet(config, resume=True).metrics["step"].tolist() == [0, 1, 2, 3, 4]


def test_a_disk_full_of_bytes_is_told_like_a_limit(tiny_config, tmp_path):
    config = tiny_config(tmp_path, steps=4, checkpoint_every=1)
    file = tmp_path / "run" / "metrics.jsonl"

    def full() -> None:
        file.rename(file.with_suffix(".kept"))
        file.symlink_to("/dev/full")

    group = Group(1, lambda index: (at_step(1, full), quiet(config)), tmp_path)
    assert group.wait() == [1]
    assert "DiskFullError: A file of the run could not be written ([Errno 28] No space left on device)" in group.errors(
        0
    )


@pytest.mark.parametrize("code", [errno.EROFS, errno.EIO])
def test_a_disk_that_fails_is_told_and_the_run_goes_on(tiny_config, tmp_path, code):
    config = tiny_config(tmp_path, steps=4, checkpoint_every=1)

    def fails(descriptor):
        raise OSError(code, os.strerror(code))

    group = Group(1, lambda index: (at_step(1, lambda: setattr(os, "fsync", fails)), quiet(config)), tmp_path)
    assert group.wait() == [1]
    folder = tmp_path / "run"
    assert f"DiskFullError: A file of the run could not be written ([Errno {code}]" in group.errors(0)
    told = f"checkpoints/step-000001. See that {folder} can be written again, then go on: tgpo-lab train --resume"
    assert told in group.errors(0)
    assert quiet(config, resume=True).completed


@pytest.mark.parametrize("gone", ["", "checkpoints"])
def test_a_folder_that_is_taken_away_is_told(tiny_config, tmp_path, gone):
    folder = tmp_path / "run"

    def taken_away() -> None:
        shutil.rmtree(folder / gone)
        (folder / gone).write_text("a file in its place")

    group = Group(1, lambda index: (at_step(1, taken_away), quiet(tiny_config(tmp_path))), tmp_path)
    assert group.wait() == [1]
    assert "DiskFullError: A file of the run could not be written (" in group.errors(0)
    again = f"There is no checkpoint yet: see that {folder} can be written again"
    assert (again if gone else f"{folder} holds the run no more: restore it") in group.errors(0)


def test_a_file_that_is_missing_elsewhere_is_not_the_disks_fault(tiny_config, tmp_path):
    group = Group(1, lambda index: (at_step(1, lambda: os.stat("/none")), quiet(tiny_config(tmp_path))), tmp_path)
    assert group.wait() == [1] and "FileNotFoundError" in group.errors(0).splitlines()[-1]


def test_no_room_for_the_first_checkpoint(tiny_config, tmp_path):
    group = Group(2, lambda index: (no_file_above(100_000), quiet(tiny_config(tmp_path))), tmp_path)
    assert group.wait() == [1, 1]
    told = f"There is no checkpoint yet: make room, then begin again: tgpo-lab train --resume {tmp_path}/run\n"
    assert told in group.errors(0)
    assert "OtherProcessError: The first process has stopped" in group.errors(1)
    assert checkpoint_folders(tmp_path / "run" / "checkpoints") == []
    assert quiet(tiny_config(tmp_path), resume=True).completed


def test_no_room_for_the_configuration_of_a_run(tiny_config, tmp_path):
    group = Group(1, lambda index: (no_file_above(100), quiet(tiny_config(tmp_path))), tmp_path)
    assert group.wait() == [1]
    assert f"InputError: Cannot write to the folder {tmp_path}/run (File too large). Make room" in group.errors(0)
    assert [file.name for file in (tmp_path / "run").iterdir()] == [".lock"]


# ── A scheduler's signal ─────────────────────────────────────────────────────────────────────────


def test_sigterm_saves_and_says_how_to_go_on_like_ctrl_c(tiny_config, tmp_path):
    config = tiny_config(tmp_path, steps=6, checkpoint_every=100)
    arguments = [
        *("train", "--student", config.student, "--teacher", config.teacher, "--dataset", config.dataset),
        *("--steps", "6", "--prompts-per-step", "2", "--group-size", "4", "--max-new-tokens", "12"),
        *("--evaluation-prompts", "4", "--evaluate-every", "0", "--output", str(tmp_path / "run")),
    ]

    def work(index: int) -> None:
        sys.stdout = (tmp_path / "told").open("w", buffering=1)
        at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        (tmp_path / "status").write_text(str(main(arguments)))

    group = Group(1, work, tmp_path)
    assert group.wait() == [0], group.errors(0)
    assert (tmp_path / "status").read_text() == "130"
    told = f"Stopped after step 3 of 6. To go on: tgpo-lab train --resume {tmp_path}/run"
    assert told in (tmp_path / "told").read_text()
    assert read_state(latest_checkpoint(tmp_path / "run")).step == 3
    assert main(["train", "--quiet", "--resume", str(tmp_path / "run")]) == 0
    quiet(config.with_changes(output=str(tmp_path / "straight"), evaluate_every=0, gradient_terms_every=5))
    assert largest_difference(tmp_path / "run", tmp_path / "straight") == 0.0
