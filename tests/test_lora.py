"""Training adapters instead of all weights: what is trained, what is stored, what loads again."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tgpo_lab.config import TrainConfig
from tgpo_lab.doctor.diagnose import diagnose
from tgpo_lab.errors import InputError
from tgpo_lab.models.lora import add_adapters
from tgpo_lab.models.pairs import load_model
from tgpo_lab.runs import latest_checkpoint, load_run
from tgpo_lab.training import train

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs the extra lora")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([[5, 9, 12, 700, 2]])).logits


def test_without_peft_the_extra_is_named(monkeypatch, tiny_config, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'tgpo-lab\[lora\]'"):
        train(tiny_config(tmp_path, lora_rank=4), show_progress=False)
    assert not (tmp_path / "run").exists()


def test_merging_needs_adapters():
    with pytest.raises(InputError, match="lora_rank is 0"):
        TrainConfig(lora_merged=True)


@needs_peft
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_new_adapters_change_nothing_and_are_all_that_is_trained(random_pair, role):
    model = load_model(getattr(random_pair, role), torch.bfloat16, "cpu")
    before, own_class = logits(model), type(model)
    add_adapters(model, 4, 8.0, seed=0)
    assert type(model) is own_class and torch.equal(logits(model), before)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # Two layers of seven products (q, k, v, o, gate, up, down) with an A and a B each.
    assert len(trained) == 2 * 7 * 2 and all("lora_" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16


@needs_peft
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_trains_the_adapters_and_leaves_the_base_alone(tiny_config, tmp_path, random_pair, precision):
    config = tiny_config(tmp_path, lora_rank=4, learning_rate=0.01, precision=precision, gradient_checkpointing=True)
    run = train(config, show_progress=False)
    base = load_model(random_pair.student, torch.float32, "cpu")
    for name, parameter in run.student.named_parameters():
        if "lora_" not in name:
            own = base.get_parameter(name.replace(".base_layer", ""))
            assert torch.equal(parameter, own.to(parameter.dtype)), name
        elif "lora_B" in name:
            assert parameter.abs().sum() > 0, name  # zero at the start
    stored = load_file(latest_checkpoint(run.directory) / "optimizer.safetensors")
    assert stored and all("lora_" in key for key in stored)


@needs_peft
def test_adapters_load_on_top_of_their_base(tiny_config, tmp_path):
    run = train(tiny_config(tmp_path, lora_rank=4, learning_rate=0.01), show_progress=False)
    checkpoint = latest_checkpoint(run.directory)
    assert not (checkpoint / "model.safetensors").exists()  # a checkpoint of the adapters' size
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert torch.allclose(logits(loaded), logits(run.student), atol=1e-6)
    assert AutoTokenizer.from_pretrained(checkpoint).eos_token == "<eos>"
    assert torch.allclose(logits(load_run(run.directory).student), logits(run.student), atol=1e-6)


@needs_peft
def test_adapters_end_where_their_run_did(tiny_config, tmp_path, random_pair):
    teacher = Path(shutil.copytree(random_pair.teacher, tmp_path / "teacher"))
    GenerationConfig(eos_token_id=[1, 5]).save_pretrained(teacher)  # the base knows of 1 alone
    run = train(tiny_config(tmp_path, teacher=str(teacher), lora_rank=2), show_progress=False)
    assert load_model(run.config.student, torch.float32, "cpu").generation_config.eos_token_id == 1
    checkpoint = latest_checkpoint(run.directory)
    assert load_model(checkpoint, torch.float32, "cpu").generation_config.eos_token_id == [1, 5]
    (checkpoint / "generation_config.json").write_text('{"eos')
    with pytest.raises(InputError, match="could not be loaded"):
        load_model(checkpoint, torch.float32, "cpu")


@needs_peft
def test_a_merged_checkpoint_is_an_ordinary_model(tiny_config, tmp_path):
    run = train(tiny_config(tmp_path, lora_rank=4, learning_rate=0.01, lora_merged=True), show_progress=False)
    checkpoint = latest_checkpoint(run.directory)
    tensors = load_file(checkpoint / "model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in tensors)
    merged = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert torch.allclose(logits(merged), logits(run.student), atol=1e-5)
    assert not torch.allclose(logits(merged), logits(load_model(run.config.student, torch.float32, "cpu")), atol=1e-2)


@needs_peft
@pytest.mark.parametrize("merged", [False, True])
def test_a_resumed_run_ends_with_the_same_adapters_bit_for_bit(tiny_config, tmp_path, merged):
    options = {"lora_rank": 4, "learning_rate": 0.01, "lora_merged": merged, "evaluate_every": 0}
    whole = train(tiny_config(tmp_path / "whole", steps=4, **options), show_progress=False)
    config = tiny_config(tmp_path / "parts", steps=2, **options)
    train(config, show_progress=False)
    parts = train(config.with_changes(steps=4), resume=True, show_progress=False)
    for (name, one), two in zip(whole.student.named_parameters(), parts.student.parameters(), strict=True):
        assert torch.equal(one, two), name
    numbers = [c for c in whole.metrics.columns if not c.startswith("seconds")]
    assert whole.metrics[numbers].equals(parts.metrics[numbers])


@needs_peft
def test_adapters_beside_a_merged_model_are_missed_when_they_are_cut(tiny_config, tmp_path):
    run = train(tiny_config(tmp_path, lora_rank=4, lora_merged=True, steps=1), show_progress=False)
    adapters = latest_checkpoint(run.directory) / "adapter" / "adapter_model.safetensors"
    adapters.write_bytes(adapters.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"adapter_model\.safetensors has \d+ bytes where"):
        latest_checkpoint(run.directory)


@needs_peft
@pytest.mark.parametrize("rank", [0, 4])
def test_adapters_are_no_student_of_another_run(tiny_config, tmp_path, rank):
    """They are frozen as they load, and new ones cannot be put on top of them."""
    made = train(tiny_config(tmp_path / "made", lora_rank=4, steps=1), show_progress=False)
    adapters = latest_checkpoint(made.directory)
    config = tiny_config(tmp_path, student=str(adapters), lora_rank=rank)
    with pytest.raises(InputError, match=rf"{adapters} holds adapters.*--resume.*merge_and_unload") as refusal:
        train(config, show_progress=False)
    assert not Path(config.output).exists()
    assert [f.text for f in diagnose(config, device="cpu").findings if f.level == "refused"] == [str(refusal.value)]
    # As a teacher they are as good as any model.
    assert diagnose(tiny_config(tmp_path, teacher=str(adapters)), device="cpu").memory.parts["teacher"] > 0
    assert train(tiny_config(tmp_path, teacher=str(adapters), steps=1), show_progress=False).completed
