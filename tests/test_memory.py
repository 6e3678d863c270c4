"""The estimate of memory against what models, optimisers, caches and checkpoints really take."""

import importlib.util

import pytest
import torch
from published_models import QWEN
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tgpo_lab.config import TrainConfig
from tgpo_lab.doctor.memory_estimate import checkpoint_bytes, estimate_memory, shape_of
from tgpo_lab.methods import make_method
from tgpo_lab.models.lora import add_adapters
from tgpo_lab.runs import latest_checkpoint
from tgpo_lab.sampling.decoding import preallocated_cache
from tgpo_lab.training import train

SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
MODELS = {
    "llama": LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "qwen3": Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=32, tie_word_embeddings=False)),
}


@pytest.mark.parametrize("name", MODELS)
def test_weights_moments_and_cache_are_counted_exactly(name):
    model = MODELS[name]
    shape = shape_of(model.config)
    assert shape.weights == sum(p.numel() for p in model.parameters())
    config = TrainConfig(prompts_per_step=3, group_size=2, max_new_tokens=10, gradient_checkpointing=True)
    parts = estimate_memory(config, shape, shape, prompt_tokens=7, device="cpu").parts
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()
    optimizer.step()
    moments = sum(v.numel() * 4 for state in optimizer.state.values() for v in state.values() if v.ndim)
    assert (parts["student"], parts["gradients"], parts["AdamW"]) == (
        shape.weights * 4, sum(p.grad.numel() * 4 for p in model.parameters()), moments,
    )  # fmt: skip
    cache = preallocated_cache(model, 17)
    with torch.no_grad():
        model.base_model(torch.ones(6, 17, dtype=torch.long), past_key_values=cache, use_cache=True)
    cached = sum(layer._keys.nbytes + layer._values.nbytes for layer in cache.layers)
    assert cached == 6 * 17 * shape.keys_and_values * 4 * shape.layers


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_under_autocast_keys_and_values_take_two_bytes_each(name, stored):
    model = type(MODELS[name])(MODELS[name].config).to(stored)
    cache = preallocated_cache(model, 17)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.base_model(torch.ones(6, 17, dtype=torch.long), past_key_values=cache, use_cache=True)
    one = 6 * 17 * shape_of(model.config).keys_and_values // 2
    assert {(layer._keys.nbytes, layer._values.nbytes) for layer in cache.layers} == {(one * 2, one * 2)}


@pytest.mark.parametrize("name", MODELS)
def test_layers_and_what_is_outside_them_are_those_that_fsdp_takes(name):
    model, shape = MODELS[name], shape_of(MODELS[name].config)
    assert shape.layer == sum(p.numel() for p in model.model.layers[0].parameters())
    assert shape.outside == shape.weights - 3 * shape.layer == 512 * 64 * (1 if name == "llama" else 2) + 64


def test_the_largest_module_of_a_mixture_is_one_layers_experts():
    shape = shape_of(QWEN["Qwen/Qwen3-30B-A3B"])
    assert shape.largest == 128 * 3 * 2048 * 768
    assert shape_of(QWEN["Qwen/Qwen3-8B"]).largest == 151936 * 4096  # the embeddings


@pytest.mark.parametrize("name", MODELS)
def test_what_layers_keep_for_the_backward_pass_is_about_as_estimated(name):
    model, tokens = MODELS[name], 256
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.base_model(torch.randint(0, 512, (2, tokens // 2)), use_cache=False).last_hidden_state
    measured = sum(kept.values())
    assert hidden.requires_grad
    shape = shape_of(model.config)
    estimated = tokens * shape.layers * (2 * shape.hidden + shape.kept) * 4
    assert 0.6 < measured / estimated < 1.4, (measured, estimated)


@pytest.mark.parametrize("name, billions", [
    ("Qwen/Qwen2.5-Math-1.5B", 1.54), ("Qwen/Qwen2.5-Math-7B", 7.62), ("Qwen/Qwen3-4B", 4.02),
    ("Qwen/Qwen3-8B", 8.19), ("Qwen/Qwen3-30B-A3B", 30.5)])  # fmt: skip
def test_real_models_have_their_published_size(name, billions):
    assert shape_of(QWEN[name]).weights / 1e9 == pytest.approx(billions, abs=0.05)


def test_each_setting_changes_the_part_that_it_should():
    shape = shape_of(QWEN["Qwen/Qwen2.5-Math-1.5B"])

    def parts(**changes) -> dict[str, int]:
        return estimate_memory(TrainConfig(**changes), shape, shape).parts

    plain = parts()
    assert parts(precision="bfloat16")["teacher"] * 2 == plain["teacher"]
    assert (
        parts(precision="bfloat16")["copy in bfloat16"] * 2
        == plain["student"]
        == parts(precision="bfloat16")["student"]
    )
    adapted = parts(precision="bfloat16", lora_rank=8)
    assert adapted["student"] * 2 == plain["student"] and "copy in bfloat16" not in adapted
    assert adapted["AdamW"] < plain["AdamW"] / 50
    many = {"prompts_per_step": 64, "max_new_tokens": 2048}
    assert parts(**many, group_size=16)["sampling"] > 1.9 * parts(**many)["sampling"]
    # SFT lets the teacher write as many responses as the student, with its own, larger cache.
    teacher = shape_of(QWEN["Qwen/Qwen3-4B"])
    writing = [
        estimate_memory(TrainConfig(**many, method=make_method(name)), shape, teacher).parts
        for name in ("tgpo", "luffy", "sft")
    ]
    assert writing[0] == writing[1] and "sampling" not in writing[2]
    assert writing[0]["sampling"] < writing[2]["teacher's responses"] / 4
    long = {"micro_batch_tokens": 2**18}
    assert parts(**long, gradient_checkpointing=True)["update"] < parts(**long)["update"] / 5


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs the extra lora")
def test_adapters_have_the_counted_size():
    model = LlamaForCausalLM(MODELS["llama"].config)
    add_adapters(model, 4, 8.0, seed=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 4 * shape_of(MODELS["llama"].config).linear


def test_a_checkpoint_has_the_counted_size(tiny_config, tmp_path):
    config = tiny_config(tmp_path, steps=1)
    run = train(config, show_progress=False)
    written = latest_checkpoint(run.directory)
    weights = sum((written / name).stat().st_size for name in ("model.safetensors", "optimizer.safetensors"))
    assert weights == pytest.approx(checkpoint_bytes(config, shape_of(run.student.config)), rel=0.1)


def test_a_teacher_elsewhere_takes_no_memory_here_and_an_offloaded_one_two_output_layers():
    shape = shape_of(MODELS["qwen3"].config)

    def teacher_of(device="cuda", **changes):
        config = TrainConfig(prompts_per_step=3, group_size=2, max_new_tokens=10, **changes)
        return estimate_memory(config, shape, shape, device=device).parts.get("teacher", 0)

    assert teacher_of() == teacher_of(teacher_device="cuda:0") == shape.weights * 4
    for changes in ({"teacher_device": "cpu"}, {"teacher_device": "cuda:1"}, {"teacher_server": "http://host/v1"}):
        assert teacher_of(**changes) == 0
    assert teacher_of(teacher_offload=True) == 2 * 512 * 64 * 4
