"""vLLM in several processes, through the stand-in: whole weights in each, the run of one, and all stop."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from process_group import Group
from safetensors.torch import load_file, save_file
from same_run import COMMON, FSDP, assert_same_run, quiet

from tgpo_lab.runs import latest_checkpoint
from tgpo_lab.sampling import vllm_engine

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs the extra lora")
VLLM = {**COMMON, "engine": "vllm", "keep_checkpoints": 0}


@pytest.fixture
def config(tiny_config, untied_student, vllm):
    """A function ``config(folder, **changes)``: a run with vLLM that keeps every checkpoint."""
    return lambda folder, **changes: tiny_config(folder, **{**VLLM, "student": str(untied_student), **changes})


def given(output: str, index: int) -> list[dict[str, torch.Tensor]]:
    """What a process of a run was given by :func:`quiet_and_kept`, in order."""
    return [load_file(file) for file in sorted(Path(output).parent.glob(f"{Path(output).name}-given-{index}-*"))]


def quiet_and_kept(config, index: int, vllm) -> None:
    """Train, and write down all weights that the engine of this process was given."""
    vllm.RELOADS.clear()
    quiet(config)
    for number, weights in enumerate(vllm.RELOADS):
        save_file(weights, f"{config.output}-given-{index}-{number:02d}")


def assert_given_every_step(output: str, index: int) -> None:
    """The weights of each step's checkpoint, whole, bit by bit, for held-out prompts and again for the step's own."""
    checkpoints = [load_file(f / "model.safetensors") for f in sorted((Path(output) / "checkpoints").iterdir())]
    assert len(checkpoints) == 3
    assert not torch.equal(*(c["model.layers.0.mlp.up_proj.weight"] for c in checkpoints[1:]))
    reloads = given(output, index)
    assert len(reloads) == 5
    for number, weights in enumerate(reloads):
        wanted = checkpoints[number // 2]
        assert weights.keys() == wanted.keys()
        for name, weight in weights.items():
            assert torch.equal(weight, wanted[name]), (number, name)


def test_sharded_students_reach_every_engine_whole_and_make_the_run_of_one_process(
    config, random_pair, tmp_path, vllm, monkeypatch
):
    # vLLM would not renew a tied output matrix on a CPU; on a GPU it does, and so does the stand-in.
    monkeypatch.setattr(vllm_engine, "require_renewable_weights", lambda student, device: None)
    configs = [
        config(tmp_path, output=str(tmp_path / "untied"), method="luffy"),
        config(tmp_path, output=str(tmp_path / "tied"), student=str(random_pair.student), vllm_sleep=True,
               gradient_checkpointing=True, mini_batches=3),
        # One process has neither prompts to sample for nor held-out ones.
        config(tmp_path, output=str(tmp_path / "idle"), prompts_per_step=1, evaluation_prompts=1, method="exact-rkl"),
    ]  # fmt: skip
    group = Group(2, lambda index: [quiet_and_kept(c, index, vllm) for c in configs], tmp_path, **FSDP)
    assert group.wait() == [0, 0], (group.errors(0), group.errors(1))
    for one in configs:
        quiet(one.with_changes(output=one.output + "-one"))
        assert_same_run(Path(one.output), Path(one.output + "-one"))
        for index in range(2):
            assert_given_every_step(one.output, index)
    assert "lm_head.weight" in given(configs[0].output, 0)[0] and "lm_head.weight" not in given(configs[1].output, 0)[0]


@needs_peft
def test_adapters_reach_every_engine_merged(config, tmp_path, vllm):
    adapted = config(tmp_path, lora_rank=2, lora_merged=True, learning_rate=0.01)
    group = Group(2, lambda index: quiet_and_kept(adapted, index, vllm), tmp_path)
    assert group.wait() == [0, 0], (group.errors(0), group.errors(1))
    quiet(adapted.with_changes(output=str(tmp_path / "one")))
    assert_same_run(tmp_path / "run", tmp_path / "one")
    merged = [load_file(f / "model.safetensors") for f in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    for index in range(2):
        reloads = given(adapted.output, index)
        assert len(reloads) == 5
        for number, weights in enumerate(reloads):
            assert weights.keys() == merged[number // 2].keys()
            for name, weight in weights.items():
                torch.testing.assert_close(weight, merged[number // 2][name], rtol=1e-6, atol=1e-7, msg=name)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert float((reloads[-1][name] - reloads[0][name]).abs().max()) > 1e-3


@needs_peft
def test_adapters_under_fsdp_are_refused(config, tmp_path):
    group = Group(2, lambda index: quiet(config(tmp_path, lora_rank=2)), tmp_path, **FSDP)
    assert group.wait() == [1, 1]
    for index in range(2):
        assert "InputError: lora_rank is 2, but adapters are not trained under FSDP" in group.errors(index)
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_one_process_and_again_with_two(config, tmp_path, vllm):
    straight = config(tmp_path, output=str(tmp_path / "straight"), steps=3)
    quiet(straight)
    parts = straight.with_changes(output=str(tmp_path / "parts"))
    for steps, processes in ((1, 2), (2, 1), (3, 2)):
        part = parts.with_changes(steps=steps)
        group = Group(processes, lambda index, part=part: quiet(part, resume=part.steps > 1), tmp_path, **FSDP)
        assert group.wait() == [0] * processes, (steps, group.errors(0), group.errors(1))
    assert_same_run(tmp_path / "parts", tmp_path / "straight")


# ── Failing in one process ───────────────────────────────────────────────────────────────────────


def assert_others_loss_told(error: str, folder: Path) -> None:
    """One sentence, and nothing after it."""
    assert re.search(
        r"OtherProcessError: Another of the 2 processes has ended or does not answer \(.+\)\. "
        rf"To go on: tgpo-lab train --resume {folder}/run, with all processes\.\n$",
        error,
    ), error


def too_few_responses(vllm) -> None:
    generate = vllm.LLM.generate

    def shortened(self, *arguments, **options):
        answered = generate(self, *arguments, **options)
        return answered if len(vllm.RELOADS) < 3 else answered[:-1]

    vllm.LLM.generate = shortened


def weights_that_do_not_fit(vllm) -> None:
    collective_rpc = vllm.LLM.collective_rpc

    def refusing(self, method, kwargs):
        def some():
            for number, pair in enumerate(kwargs["weights_iterator"]):
                if number == 4 and len(vllm.RELOADS) == 3:
                    raise AssertionError("Attempted to load weight")
                yield pair

        return collective_rpc(self, method, kwargs={"weights_iterator": some()})

    vllm.LLM.collective_rpc = refusing


@pytest.mark.parametrize("environment", [{}, FSDP], ids=["replicated", "sharded"])
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(
    "damage, message",
    [
        (too_few_responses, r"RunError: vLLM gave \d+ of \d+ responses back, .* go on from the last one"),
        (weights_that_do_not_fit, "AssertionError: Attempted to load weight"),
    ],
    ids=["sampling", "weights"],
)
def test_an_engine_that_fails_in_one_process_ends_all_and_the_run_goes_on(
    config, tmp_path, vllm, environment, failing, damage, message
):
    """After the first step, in the evaluation before the second."""
    run = config(tmp_path)

    def work(index: int) -> None:
        if index == failing:
            damage(vllm)
        quiet(run)

    group = Group(2, work, tmp_path, **environment)
    assert group.wait() == [1, 1]
    assert re.search(message, group.errors(failing)), group.errors(failing)
    assert_others_loss_told(group.errors(1 - failing), tmp_path)
    assert latest_checkpoint(tmp_path / "run").name == "step-000001"
    quiet(run, resume=True)
    quiet(run.with_changes(output=str(tmp_path / "straight")))
    assert_same_run(tmp_path / "run", tmp_path / "straight")


def memory_that_others_hold(vllm) -> None:
    vllm.FREE_MEMORY = 0.1  # the others wait for this process, within vLLM


def no_room_for_the_cache(vllm) -> None:
    start = vllm.LLM.__init__

    def refusing(self, *arguments, **options):
        start(self, *arguments, **options)
        raise ValueError("No available memory for the cache blocks.")  # the others go on

    vllm.LLM.__init__ = refusing


@pytest.mark.parametrize("environment", [{}, FSDP], ids=["replicated", "sharded"])
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(
    "damage, message",
    [(memory_that_others_hold, "Free memory on device"), (no_room_for_the_cache, "No available memory for the cache")],
    ids=["early", "late"],
)
def test_an_engine_that_does_not_start_in_one_process_ends_all(
    config, tmp_path, vllm, environment, failing, damage, message
):
    def work(index: int) -> None:
        if index == failing:
            damage(vllm)
        quiet(config(tmp_path))

    group = Group(2, work, tmp_path, **environment)
    assert group.wait() == [1, 1]
    assert re.search(rf"InputError: vLLM does not start with .*: {message}", group.errors(failing))
    assert_others_loss_told(group.errors(1 - failing), tmp_path)
