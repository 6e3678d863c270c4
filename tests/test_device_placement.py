"""Whole runs on a device that is not there: every tensor of a step has to be made where it is used."""

import pytest
import torch
from accelerate import Accelerator
from pretended_gpu import GPU, MixedDevices, OnGPU, moved_model, pretended_gpu
from transformers import PreTrainedModel

from tgpo_lab import training
from tgpo_lab.diagnostics.pair_card import measure_pair
from tgpo_lab.doctor.diagnose import diagnose
from tgpo_lab.explorer.exploration import Exploration
from tgpo_lab.explorer.student_history import StudentHistory
from tgpo_lab.methods import make_method, method_entries
from tgpo_lab.methods.tgpo import TGPO
from tgpo_lab.models.pairs import load_pair
from tgpo_lab.sampling.engine import OwnEngine
from tgpo_lab.sampling.fixed_shape_decoding import FixedShapeDecoder
from tgpo_lab.sampling.vllm_engine import VLLMEngine
from tgpo_lab.schedules import Constant
from tgpo_lab.tasks.prompts import load_prompts


@pytest.fixture
def gpu(monkeypatch):
    """Models go to the pretended GPU when they are told to go to one, and accelerate believes in it."""
    usual = PreTrainedModel.to

    def to(model, device, *rest):
        return moved_model(model) if torch.device(device).type == "cuda" else usual(model, device, *rest)

    monkeypatch.setattr(PreTrainedModel, "to", to)
    monkeypatch.setattr(Accelerator, "device", property(lambda _: GPU))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # of which a tensor's subclass can be no part
    # What computes is the CPU, so its autocast has to convert.
    autocast, enabled = torch.autocast, torch.is_autocast_enabled
    monkeypatch.setattr(torch, "autocast", lambda _, *rest, **options: autocast("cpu", *rest, **options))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: enabled("cpu"))
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.bfloat16)
    monkeypatch.setattr(training, "save_checkpoint", lambda *_, **__: None)
    with pretended_gpu():
        yield GPU


@pytest.fixture
def run(gpu, tiny_config, tmp_path):
    def run(**changes):
        result = training.train(tiny_config(tmp_path, **{"steps": 1, **changes}), show_progress=False)
        assert {p.device for p in result.student.parameters()} == {GPU}
        assert result.completed
        return result

    return run


def test_what_a_gpu_refuses_is_refused(gpu):
    there, here = torch.ones(3, device=GPU), torch.arange(3)
    with pytest.raises(MixedDevices):
        there + here
    with pytest.raises(MixedDevices):
        here[there.long()]
    with pytest.raises(MixedDevices):
        torch.cat([there, here.float()])
    assert (there[here] + torch.tensor(1.0)).tolist() == [2, 2, 2]
    assert there.device == GPU and there.cpu().device.type == "cpu" and isinstance(there.to("cuda"), OnGPU)


@pytest.mark.parametrize("name", [entry.name for entry in method_entries()])
def test_every_method_keeps_to_one_device(name, run):
    assert len(run(method=name).metrics) == 2


OPTIONS = {
    "several updates": {"mini_batches": 2, "passes": 2},
    "importance weights": {"importance_cap": 1.5, "temperature": 0.7, "method": "kdrl"},
    "importance weights of old log-probabilities": {"importance_cap": 1.5, "mini_batches": 2},
    "everything measured": {"measured_positions": 0, "method": "exact-rkl"},
    "few rows at once": {"sampling_rows": 3, "micro_batch_tokens": 40, "method": "sft"},
    "recomputation": {"gradient_checkpointing": True},
    "bfloat16": {"precision": "bfloat16", "method": "tgpo-top-k"},
    "bfloat16 with recomputation": {"precision": "bfloat16", "gradient_checkpointing": True, "mini_batches": 2},
    "teacher on the CPU": {"teacher_device": "cpu", "method": "tgpo-full"},
    "teacher on the CPU that writes": {"teacher_device": "cpu", "method": "luffy"},
    "a sum over tokens": {
        "method": TGPO(weight=Constant(0.1), guidance_sum=True, gate="confidence", gate_threshold=0.5)
    },
    "gkd": {"method": make_method("gkd", beta=0.3), "passes": 2},
    "entropy bonus": {"method": make_method("grpo++", entropy_bonus=0.1)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_keeps_to_its_devices(name, run):
    run(**OPTIONS[name])


@pytest.fixture
def pair(gpu, untied_student, random_pair):
    return load_pair(untied_student, random_pair.teacher, device=GPU)


@pytest.mark.parametrize("name", ["own", "fixed shapes", "vllm"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_each_engine_keeps_to_one_device(name, temperature, pair, vllm):
    engine = OwnEngine(pair.student) if name != "vllm" else VLLMEngine(pair.student, max_length=40, precision="float32")
    if name == "fixed shapes":
        engine._decoder = FixedShapeDecoder(pair.student, compiled=False)
    with engine.load_weights():
        rollouts = engine.sample(
            pair.encode(["1+2+4=", "7+0+0=", "12+34+56+78="]), 40 if name == "own" else 8, list(range(0, 2048, 4)), 0,
            samples_per_prompt=3 if temperature else 1, temperature=temperature, vocabulary_size=2000,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    assert {x.device for x in (rollouts.responses, rollouts.mask, rollouts.finished)} == {GPU}
    assert temperature == 0 or rollouts.logprobs.device == GPU


def test_the_explorer(pair):
    explored = Exploration(pair, [StudentHistory.of_pair(pair)], ["1+2+4="], ["7"], samples=3, max_new_tokens=8)
    first = explored.responses(0)[0]
    best = int(first.view.teacher_best[0, 0])
    token = best if best != int(first.view.rollouts.responses[0, 0]) else best + 1
    branch = explored.take_token(first.name, 0, token)
    assert len(branch.frame()) == branch.length and branch.text and first.summary()


def test_the_card_of_a_pair(pair, random_pair):
    prompts = load_prompts(random_pair.prompts)["test"]
    assert measure_pair(pair, prompts, max_new_tokens=12).prompts == len(prompts)


def test_the_doctor(gpu, tiny_config, tmp_path):
    found = diagnose(tiny_config(tmp_path), prompts=4, device=GPU, available_memory=80 * 10**9)
    assert not [f for f in found.findings if f.level == "refused"]


@pytest.mark.parametrize("guidance", ["argmax", "sampled", "top_k"])
def test_the_teacher_of_a_trl_trainer(guidance, pair):
    pytest.importorskip("trl", reason="needs the extra trl")
    from tgpo_lab.integrations.trl.batch_teacher import answer_in_forward, ask_about_batch

    answer_in_forward(pair.teacher)
    written = torch.tensor([[7, 8, 9], [10, 2047, 0]])
    batch = {"prompt_ids": torch.tensor([[0, 5, 6], [3, 4, 5]]), "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
             "completion_ids": written, "completion_mask": (written > 0).long(),
             "tool_mask": torch.tensor([[1, 0, 1], [1, 1, 1]])}  # fmt: skip
    answers = ask_about_batch(
        pair.teacher, {name: values.to(GPU) for name, values in batch.items()},
        TGPO(guidance=guidance, gate="trust_horizon"), vocabulary_size=2000, rows_at_once=1, sampling_seed=3,
    )  # fmt: skip
    assert {values.device for values in answers.values()} == {GPU}
