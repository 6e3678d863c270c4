"""A teacher elsewhere than the student: on another device, or offloaded with its weights on the CPU."""

import functools

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import tgpo_lab
from tgpo_lab.errors import InputError
from tgpo_lab.models.pairs import load_pair
from tgpo_lab.models.policy import project_to_vocabulary
from tgpo_lab.parallel.placement import device_of, offload, require_device
from tgpo_lab.rollouts import Rollouts
from tgpo_lab.runs import latest_checkpoint
from tgpo_lab.sampling.cached_sampling import sample_responses
from tgpo_lab.teacher import ask_teacher


@pytest.fixture
def tiny_config(tiny_config, tmp_path):
    return functools.partial(tiny_config, tmp_path)


def fresh_pair(random_pair):
    return load_pair(random_pair.student, random_pair.teacher)


def rollouts():
    responses = torch.tensor([[7, 8, 9], [10, 11, 0]])
    return Rollouts([[3, 4, 5], [6]], responses, responses > 0, torch.tensor([True, True]), 0)


def test_an_offloaded_teacher_gives_the_same_answers_and_holds_no_layer_between_them(random_pair):
    teacher = fresh_pair(random_pair).teacher
    options = {"vocabulary_size": 2048, "micro_batch_tokens": 6, "keep_distribution": rollouts().mask, "top_k": 3}
    before = ask_teacher(teacher, rollouts(), **options)
    projected = project_to_vocabulary(teacher, before.hidden)
    offload(teacher, "cpu")
    for _ in range(2):
        after = ask_teacher(teacher, rollouts(), **options)
        # By its own forward pass, as its layers' weights are there only while they are called: to rounding the same.
        for name in ("logprobs", "tokens", "confidence", "top_tokens", "top_logprobs", "hidden"):
            torch.testing.assert_close(getattr(after, name), getattr(before, name), msg=name)
        torch.testing.assert_close(project_to_vocabulary(teacher, after.hidden), projected)
        held = {name for name, weight in teacher.base_model.named_parameters() if weight.device.type != "meta"}
        assert not held
    assert device_of(teacher).type == "cpu" and teacher.device.type == "meta"


def test_output_embeddings_of_their_own_stay_in_place():
    config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = model(tokens).logits
        offload(model, "cpu")
        hidden = model.base_model(tokens).last_hidden_state
        assert torch.equal(project_to_vocabulary(model, hidden), expected)
    assert not model.get_output_embeddings().weight.is_meta
    assert all(weight.is_meta for weight in model.base_model.parameters())


def test_an_offloaded_teacher_writes_the_same_responses(random_pair):
    teacher = fresh_pair(random_pair).teacher
    prompts = [[45, 46, 47], [50], [45, 50]]

    def written():
        return sample_responses(teacher, prompts, 12, [1], 0, samples_per_prompt=3, vocabulary_size=2048,
                                generator=torch.Generator().manual_seed(0))  # fmt: skip

    before = written()
    offload(teacher, "cpu")
    after = written()
    assert torch.equal(before.responses, after.responses) and torch.equal(before.mask, after.mask)


@pytest.mark.parametrize("method", ["tgpo", "exact-rkl", "tgpo-top-k", "tgpo-sampled", "luffy"])
@pytest.mark.parametrize("changes", [{"teacher_offload": True}, {"teacher_device": "cpu"}], ids=["offload", "device"])
def test_a_run_with_the_teacher_elsewhere_ends_with_the_same_weights(tiny_config, tmp_path, method, changes):
    def trained(name, **changes):
        config = tiny_config(method=method, steps=2, output=str(tmp_path / name), **changes)
        result = tgpo_lab.train(config, show_progress=False)
        return load_file(latest_checkpoint(result.directory) / "model.safetensors"), result.metrics

    ours, here = trained("here")
    theirs, elsewhere = trained("elsewhere", **changes)
    # An offloaded teacher answers by its own forward pass, one in its place with fewer operations: same to rounding.
    exact = {"atol": 0.0, "rtol": 0.0} if "teacher_device" in changes else {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(theirs, ours, **exact)
    measured = [torch.tensor(metrics["reverse_kl"].to_numpy()) for metrics in (elsewhere, here)]
    torch.testing.assert_close(*measured, **exact, equal_nan=True)


@pytest.mark.parametrize("changes", [{"teacher_offload": True}, {"teacher_device": "cpu"}], ids=["offload", "device"])
def test_a_run_goes_on_with_its_teacher_elsewhere(tiny_config, tmp_path, changes):
    """As one does whose memory ran out; the numbers are the same to rounding."""

    def trained(name, **changes):
        config = tiny_config(steps=2, output=str(tmp_path / name))
        tgpo_lab.train(config, show_progress=False)
        result = tgpo_lab.train(config.with_changes(steps=4, **changes), resume=True, show_progress=False)
        return load_file(latest_checkpoint(result.directory) / "model.safetensors")

    torch.testing.assert_close(trained("moved", **changes), trained("stayed"), atol=1e-5, rtol=1e-4)


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(tiny_config, tmp_path):
    for name in ("cuda:99", "abacus"):
        with pytest.raises(InputError, match=f"no device '{name}' here: this machine has the device cpu and"):
            require_device(name)
        with pytest.raises(InputError, match=name):
            tgpo_lab.train(tiny_config(teacher_device=name), show_progress=False)
    assert not (tmp_path / "run").exists()


def test_without_weights_a_model_still_knows_its_shape_and_its_ends(random_pair):
    whole, bare = fresh_pair(random_pair), load_pair(random_pair.student, random_pair.teacher, teacher_device="meta")
    assert all(weight.is_meta for weight in bare.teacher.parameters())
    assert bare.end_tokens == whole.end_tokens and bare.vocabulary_size == whole.vocabulary_size
    assert bare.teacher.get_output_embeddings().weight.shape == whole.teacher.get_output_embeddings().weight.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("changes", [{"teacher_offload": True}, {"teacher_device": "cpu"}], ids=["offload", "device"])
def test_on_a_gpu_a_step_with_the_teacher_elsewhere_is_the_same_to_rounding(tiny_config, tmp_path, changes):
    columns = ["kl_sampled", "reverse_kl", "loss_teacher", "gradient_norm"]

    def measured(name, **changes):
        config = tiny_config(method="exact-rkl", steps=1, output=str(tmp_path / name), **changes)
        return tgpo_lab.train(config, show_progress=False).metrics[columns].iloc[0].tolist()

    assert measured("elsewhere", **changes) == pytest.approx(measured("here"), rel=1e-3)
