"""Several processes on one run: the update and the metrics of one, files from one of them, and all stop together."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from process_group import Group
from same_run import COMMON, FSDP, assert_same_run, quiet, rows

from tgpo_lab import training
from tgpo_lab.checkpoints import read_state
from tgpo_lab.errors import InputError, RunError
from tgpo_lab.loop import student_pass
from tgpo_lab.methods import make_method
from tgpo_lab.models.pairs import load_pair
from tgpo_lab.parallel.processes import ALONE, OtherProcessError, Processes, start_options
from tgpo_lab.randomness import generator_for
from tgpo_lab.runs import latest_checkpoint
from tgpo_lab.sampling.cached_sampling import sample_responses
from tgpo_lab.sampling.divided_sampling import sample_divided
from tgpo_lab.sampling.engine import OwnEngine
from tgpo_lab.teacher import ask_teacher
from tgpo_lab.teachers import sources

METHODS = ("tgpo", "kdrl", "luffy", "exact-rkl", "tgpo-sampled", "tgpo-unconditioned", "grpo++")

# ── The same update as one process ───────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def by_two(tmp_path_factory, tiny_config):
    """Runs of two processes, all methods one after the other in the same group."""
    folder = tmp_path_factory.mktemp("by-two")
    configs = {m: tiny_config(folder, method=m, output=str(folder / m), **COMMON) for m in METHODS}
    group = Group(2, lambda index: [quiet(config) for config in configs.values()], folder)
    assert group.wait() == [0, 0], (group.errors(0), group.errors(1))
    return configs


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_with_three_prompts_make_the_update_of_one(by_two, tmp_path, method):
    config = by_two[method]
    quiet(config.with_changes(output=str(tmp_path / "one")))
    assert_same_run(Path(config.output), tmp_path / "one")
    assert sorted(p.name for p in Path(config.output).iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())


def test_a_process_without_prompts_takes_part_and_mini_batches_are_those_of_one(tiny_config, tmp_path):
    changes = {**COMMON, "prompts_per_step": 2, "mini_batches": 2, "passes": 2, "evaluation_temperature": 1.0,
               "evaluation_prompts": 2}  # fmt: skip
    configs = [tiny_config(tmp_path, method=m, output=str(tmp_path / m), **changes) for m in ("rkl", "luffy")]
    group = Group(3, lambda index: [quiet(config) for config in configs], tmp_path)
    assert group.wait() == [0, 0, 0], group.errors(0)
    for config in configs:
        quiet(config.with_changes(output=config.output + "-one"))
        assert_same_run(Path(config.output), Path(config.output + "-one"))


def test_sharded_weights_make_the_same_update(tiny_config, tmp_path, untied_student):
    uneven = {**COMMON, "micro_batch_tokens": 40}  # so that one process has more micro-batches than the other
    configs = [
        tiny_config(tmp_path, method="tgpo", output=str(tmp_path / "tied"), **uneven, gradient_checkpointing=True),
        tiny_config(tmp_path, method="luffy", output=str(tmp_path / "untied"), student=str(untied_student), **uneven),
        tiny_config(tmp_path, method="exact-rkl", output=str(tmp_path / "several"), mini_batches=2, passes=2,
                    **{**uneven, "prompts_per_step": 2, "evaluation_prompts": 2}),  # one process has none of either
    ]  # fmt: skip
    group = Group(3, lambda index: [quiet(config) for config in configs], tmp_path, **FSDP)
    assert group.wait() == [0, 0, 0], (group.errors(0), group.errors(1), group.errors(2))
    for config in configs:
        quiet(config.with_changes(output=config.output + "-one"))
        assert_same_run(Path(config.output), Path(config.output + "-one"))


def test_sharded_weights_are_parts(tiny_config, tmp_path):
    """Each process holds half of every matrix, and half of its moments."""
    config = tiny_config(tmp_path, **COMMON)

    def work(index: int) -> None:
        student = quiet(config).student
        whole = sum(p.numel() for p in student.parameters())
        own = sum(p.to_local().numel() for p in student.parameters())
        assert own == whole / 2

    group = Group(2, work, tmp_path, **FSDP)
    assert group.wait() == [0, 0], (group.errors(0), group.errors(1))


# ── Going on ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("environment", [{}, FSDP], ids=["replicated", "sharded"])
def test_a_run_goes_on_with_another_number_of_processes(tiny_config, tmp_path, environment):
    weight = "UntilAgreement(0.5, agreement=0.001, patience=1, ramp=4)"
    from tgpo_lab.schedules import parse_schedule

    method = make_method("tgpo", weight=parse_schedule(weight))  # its state is in the checkpoint
    config = tiny_config(tmp_path, method=method, **COMMON)
    quiet(config.with_changes(output=str(tmp_path / "straight"), steps=3))
    quiet(config.with_changes(steps=1))
    group = Group(2, lambda index: quiet(config, resume=True), tmp_path, **environment)
    assert group.wait() == [0, 0], (group.errors(0), group.errors(1))
    quiet(config.with_changes(steps=3), resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "straight")


def test_a_folder_that_holds_a_run_is_refused_by_the_first_and_the_others_follow(tiny_config, tmp_path):
    config = tiny_config(tmp_path, steps=1)
    quiet(config)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    group = Group(2, lambda index: quiet(config), tmp_path)
    assert group.wait() == [1, 1]
    assert "InputError" in group.errors(0) and "already holds a run" in group.errors(0)
    assert "OtherProcessError: The first process has stopped; it says why." in group.errors(1)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


# ── Stopping ─────────────────────────────────────────────────────────────────────────────────────


def wait_for_rows(folder: Path, count: int) -> None:
    file, limit = folder / "metrics.jsonl", time.monotonic() + 100
    while not (file.exists() and len(file.read_text().splitlines()) >= count):
        assert time.monotonic() < limit, "the run makes no progress"
        time.sleep(0.01)


def test_a_signal_to_one_process_stops_all_after_the_same_step(tiny_config, tmp_path):
    config = tiny_config(tmp_path, **{**COMMON, "steps": 500, "checkpoint_every": 400, "evaluate_every": 0})

    def work(index: int) -> None:
        result = quiet(config)
        (tmp_path / f"stopped-{index}").write_text(f"{result.completed} {len(result.metrics)}")

    group = Group(2, work, tmp_path)
    wait_for_rows(tmp_path / "run", 2)
    os.kill(group.pids[1], signal.SIGTERM)
    assert group.wait() == [0, 0], (group.errors(0), group.errors(1))
    step = read_state(latest_checkpoint(tmp_path / "run")).step
    assert 2 <= step < 500
    assert [(tmp_path / f"stopped-{index}").read_text() for index in range(2)] == [f"False {step}"] * 2


@pytest.mark.parametrize("killed", [0, 1])
def test_when_a_process_is_killed_the_other_stops_and_the_run_goes_on(tiny_config, tmp_path, killed):
    config = tiny_config(tmp_path, **{**COMMON, "steps": 500, "evaluate_every": 0})
    group = Group(2, lambda index: quiet(config), tmp_path)
    wait_for_rows(tmp_path / "run", 2)
    os.kill(group.pids[killed], signal.SIGKILL)
    codes = group.wait(60)
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] == 1
    assert re.search(
        r"OtherProcessError: Another of the 2 processes has ended or does not answer \(.+\)\. "
        rf"To go on: tgpo-lab train --resume {tmp_path}/run, with all processes\.",
        group.errors(1 - killed),
    )
    step = read_state(latest_checkpoint(tmp_path / "run")).step
    assert step >= 1
    result = quiet(config.with_changes(steps=step + 1), resume=True)
    assert result.completed and result.metrics["step"].tolist() == list(range(step + 2))


PHASES = {
    "sample": (OwnEngine, "sample"),
    "reward": (training, "score"),
    "teacher": (sources, "ask_teacher"),
    "update": (student_pass, "accumulate_gradients"),
    "optimiser": (training, "refuse_non_finite"),
    "gathering": (training, "optimizer_tensors"),
    "save": (training, "save_checkpoint"),  # of the first process alone
}
"""What each phase calls in every step."""


@pytest.mark.parametrize("environment", [{}, FSDP], ids=["replicated", "sharded"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_process_that_is_killed_in_a_phase_stops_the_other_there(phase, environment, tiny_config, tmp_path):
    config = tiny_config(tmp_path, **{**COMMON, "steps": 4, "evaluate_every": 0, "checkpoint_every": 1})
    killed = 0 if phase == "save" else 1

    def work(index: int) -> None:
        owner, name = PHASES[phase]
        usual, calls = getattr(owner, name), []

        def killed_at_the_second_call(*arguments, **options):
            calls.append(name)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return usual(*arguments, **options)

        if index == killed:
            setattr(owner, name, killed_at_the_second_call)
        quiet(config)

    group = Group(2, work, tmp_path, **environment)
    codes = group.wait(60)
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] == 1
    assert (
        group.errors(1 - killed)
        .splitlines()[-1]
        .startswith(
            "tgpo_lab.parallel.processes.OtherProcessError: Another of the 2 processes has ended or does not answer ("
        )
    )
    assert read_state(latest_checkpoint(tmp_path / "run")).step in (0, 1)
    assert quiet(config, resume=True).completed


def test_an_error_in_one_process_stops_all(tiny_config, tmp_path):
    """The reward fails on the second process alone."""
    config = tiny_config(tmp_path, **COMMON, reward="last_number")

    def work(index: int) -> None:
        from tgpo_lab import training

        def no_answer(name):
            def judge(response: str, answer: str) -> float:
                raise InputError("no number")

            return judge if index else (lambda response, answer: 0.0)

        training.reward_function = no_answer
        quiet(config.with_changes(evaluate_every=0, max_new_tokens=20))

    group = Group(2, work, tmp_path)
    assert group.wait() == [1, 1]
    assert "OtherProcessError" in group.errors(0) and "InputError: no number" in group.errors(1)


# ── As users start it ────────────────────────────────────────────────────────────────────────────


JUDGE = """
import os
import socket
from pathlib import Path


def judge(response: str, answer: str) -> float:
    (Path(__file__).parent / f"judged-{os.environ['RANK']}-of-{os.environ['WORLD_SIZE']}").touch()
    return float(len(response) % 2)
"""
"""A reward that leaves a file behind: which process judged, of how many."""
LAUNCH = "-m", "accelerate.commands.launch", "--num_processes", "2"
NODES = "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "static"


@pytest.mark.parametrize(
    "starts",
    [
        [(*LAUNCH, "--multi_gpu")],
        [(*LAUNCH, "--use_fsdp", "--fsdp_version", "2")],
        [(*NODES, "--node-rank", rank, "--master-addr", "127.0.0.1", "--master-port", "PORT") for rank in "01"],
    ],
    ids=["accelerate launch", "accelerate launch, FSDP", "torchrun, two machines"],
)
def test_the_same_command_under_a_launcher(tiny_config, tmp_path, monkeypatch, starts):
    (tmp_path / "judging.py").write_text(JUDGE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    config = tiny_config(tmp_path, steps=1, prompts_per_step=3, evaluate_every=5)
    train_it = [
        *("-m", "tgpo_lab", "train", "--student", config.student, "--teacher", config.teacher),
        *("--dataset", config.dataset, "--reward", "judging:judge", "--steps", "1", "--prompts-per-step", "3"),
        *("--group-size", "4", "--max-new-tokens", "12", "--evaluation-prompts", "4"),
        *("--output", str(tmp_path / "run")),
    ]
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(tmp_path), "ACCELERATE_USE_CPU": "true",
                   "MAIN_PROCESS_PORT": port}  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, *(port if word == "PORT" else word for word in start), *train_it],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for start in starts
    ]  # fmt: skip
    said = [process.communicate(timeout=280) for process in started]
    assert [process.returncode for process in started] == [0] * len(started), said
    output = "".join(out for out, _ in said)
    assert output.count("The run is in") == 1 and output.count("step 1/1") == 1
    assert {file.name for file in tmp_path.glob("judged-*")} == {"judged-0-of-2", "judged-1-of-2"}

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    quiet(config.with_changes(output=str(tmp_path / "one"), reward="judging:judge"))
    sys.modules.pop("judging")
    for one, other in zip(rows(tmp_path / "run"), rows(tmp_path / "one"), strict=True):
        for name in set(other) - {"accuracy"}:
            assert one[name] == pytest.approx(other[name], rel=3e-5, abs=1e-6), name


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP version 2 alone"),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "does not offload"),
    ],
)
def test_other_kinds_of_sharding_are_refused(tiny_config, tmp_path, environment, message):
    group = Group(2, lambda index: quiet(tiny_config(tmp_path)), tmp_path, **environment)
    assert group.wait() == [1, 1]
    assert f"InputError: The loop {'works under' if 'alone' in message else ''}" in group.errors(0)
    assert message in group.errors(0) and message in group.errors(1)
    assert not (tmp_path / "run").exists()


# ── Parts ────────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(0, 40), st.integers(1, 9))
def test_shares_hold_everything_once_and_differ_by_one_at_most(count, number):
    shares = []
    for index in range(number):
        one = Processes()
        one.number, one.index = number, index
        shares.append(one.share(count))
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_part_of_the_prompts_gets_the_samples_that_it_gets_among_all(random_pair):
    pair = load_pair(random_pair.student, random_pair.teacher)
    prompts = pair.encode(["1+2+4=", "3+3+1=", "7+0+0=", "2+2+3="])

    def sample(part, **where):
        return sample_responses(
            pair.student, part, 10, pair.end_tokens, pair.pad_token, samples_per_prompt=3,
            generator=generator_for(0, "test"), **where,
        )  # fmt: skip

    whole, part = sample(prompts), sample(prompts[1:3], first=1, of=4)
    assert part.prompts == whole.prompts[3:9]
    assert torch.equal(part.lengths, whole.lengths[3:9])
    width = part.responses.shape[1]
    assert torch.equal(part.responses, whole.responses[3:9, :width])
    assert not torch.equal(sample(prompts[1:3]).responses, part.responses)


def test_divided_responses_say_under_what_they_were_drawn_unless_greedy(random_pair, tmp_path):
    def work(index: int) -> None:
        pair = load_pair(random_pair.student, random_pair.teacher)
        processes = Processes(Accelerator(**start_options()))
        for temperature in (0.0, 1.0):
            rollouts = sample_divided(
                processes, OwnEngine(pair.student), pair.encode(["1+2+4="]), 6, [1], 0, temperature=temperature,
                generator=torch.Generator().manual_seed(0),
            )  # fmt: skip
            drawn = rollouts.logprobs is not None and bool((rollouts.logprobs[rollouts.mask] < 0).any())
            assert drawn == (temperature > 0) and (drawn or rollouts.logprobs is None)

    group = Group(2, work, tmp_path)
    assert group.wait() == [0, 0], (group.errors(0), group.errors(1))


def test_the_teacher_answers_about_some_rows_as_it_does_about_all(random_pair):
    pair = load_pair(random_pair.student, random_pair.teacher)
    rollouts = sample_responses(
        pair.student, pair.encode(["1+2+4=", "3+3+1=", "7+0+0="]), 10, pair.end_tokens, pair.pad_token,
        generator=generator_for(0, "test"),
    )  # fmt: skip

    def ask(rows):
        return ask_teacher(
            pair.teacher, rollouts, vocabulary_size=pair.vocabulary_size, micro_batch_tokens=30, top_k=2,
            keep_distribution=rollouts.mask, sampling_seed=0, rows=rows,
        )  # fmt: skip

    whole, part, rest = ask(None), ask(torch.tensor([2, 0])), ask(torch.tensor([1]))
    for name in ("logprobs", "tokens", "confidence", "sampled_tokens", "top_tokens", "top_logprobs"):
        found, wanted = getattr(part, name), getattr(whole, name)
        assert not found[1].any() and getattr(rest, name)[1].any()
        torch.testing.assert_close(found[[0, 2]], wanted[[0, 2]])
        torch.testing.assert_close(found + getattr(rest, name), wanted)
    assert (part.hidden_index[1] == -1).all()
    assert ask(None).of_all(ALONE).tokens is not None


def test_processes_that_cannot_find_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match="2 processes were started, but MASTER_ADDR does not say where they meet"):
        start_options()


def test_processes_that_were_not_joined_are_refused(tiny_config, tmp_path, monkeypatch):
    Accelerator(cpu=True)  # has settled that this process is alone, before the variable says otherwise
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(InputError, match="2 processes were started, but accelerate has not joined them"):
        quiet(tiny_config(tmp_path))


@pytest.mark.parametrize(
    "error, told",
    [
        (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (dist.DistNetworkError("Broken pipe"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:12210"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RunError("gloo/transport is no part of this sentence of ours"), False),
    ],
)
def test_code_that_communicates_on_its_own_tells_of_a_loss_and_of_nothing_else(error, told):
    two = Processes(to_go_on="Go on.")
    two.number = 2
    with pytest.raises(OtherProcessError if told else type(error)) as raised, two.loss_told():
        raise error
    assert (raised.value is not error) == told
    with pytest.raises(type(error)), ALONE.loss_told():
        raise error


GLOO = (
    "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
    "[127.0.0.1]:3218. This is typically caused by a remote worker crashing. Check the logs of the remote worker "
    "before reporting an error. GLHF! 🏖️"
)
"""As torch 2 raised it when the other of two processes had ended."""


@pytest.mark.parametrize(
    "error, reason",
    [
        (RuntimeError(GLOO), " (Connection closed by peer [127.0.0.1]:3218)"),
        (RuntimeError("[a/b.cc:84] Timed out waiting 9ms. This may indicate …"), " (Timed out waiting 9ms)"),
        (dist.DistBackendError("NCCL error in: ../c/NCCL.cpp:3384, unhandled system error\nLast error:\nx"),
         " (NCCL error in: ../c/NCCL.cpp:3384, unhandled system error)"),
        (dist.DistBackendError("word " * 100), " (" + "word " * 22 + "word …)"),
        (dist.DistBackendError(""), ""),
    ],
)  # fmt: skip
def test_a_lost_process_is_told_with_the_first_thing_that_the_library_says(error, reason):
    two = Processes(to_go_on="Go on.")
    two.number = 2
    with pytest.raises(OtherProcessError) as raised, two.loss_told():
        raise error if isinstance(error, dist.DistError) else RuntimeError(f"{error} gloo/transport")
    assert str(raised.value) == f"Another of the 2 processes has ended or does not answer{reason}. Go on."
