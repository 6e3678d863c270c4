"""The estimate of memory against what models, optimisers, caches and checkpoints really take."""

import functools
import importlib.util
import weakref
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from published_models import QWEN
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tgpo_lab.batch import Batch
from tgpo_lab.config import TrainConfig
from tgpo_lab.doctor.memory_estimate import checkpoint_bytes, estimate_memory
from tgpo_lab.doctor.model_shape import shape_of
from tgpo_lab.loop.measurement import StepMeasurement
from tgpo_lab.loop.student_pass import StudentPass, accumulate_gradients
from tgpo_lab.methods import Method, make_method
from tgpo_lab.models import policy
from tgpo_lab.models.lora import add_adapters
from tgpo_lab.models.pairs import Pair
from tgpo_lab.models.policy import positions_at_once, response_hidden_states
from tgpo_lab.precision import products_in
from tgpo_lab.rollouts import Rollouts
from tgpo_lab.runs import latest_checkpoint
from tgpo_lab.sampling.decoding import preallocated_cache
from tgpo_lab.teacher import ask_teacher
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


# ── What passes through the layers take ──────────────────────────────────────────────────────────

PASSING = {
    **MODELS,
    "llama, no shared heads": LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_key_value_heads": 4})),
    "qwen3, no shared heads": Qwen3ForCausalLM(Qwen3Config(**{**SMALL, "num_key_value_heads": 4}, head_dim=32)),
    "eager": AutoModelForCausalLM.from_config(
        AutoConfig.for_model("codegen", vocab_size=512, n_embd=64, n_layer=3, n_head=4, rotary_dim=8, n_positions=256)
    ).eval(),
}
# Prompts, samples of each, tokens of a prompt, of a response. The last response has more scores than are held at once.
BATCHES = [(4, 4, 2, 128), (8, 4, 8, 60), (2, 4, 16, 160)]


class Peak(TorchDispatchMode):
    """Bytes of all tensors made within the context, at their most."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._seen:
                storage = tensor.untyped_storage()
                self._seen.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return made

    def _freed(self, storage: int, size: int) -> None:
        self._seen.discard(storage)
        self.now -= size


def written(prompts: int, samples: int, prompt: int, response: int) -> Rollouts:
    """Responses to distinct prompts, every second of which has a token less."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(512, (prompt - row % 2,), generator=generator).tolist() for row in range(prompts)]
    responses = torch.randint(512, (prompts * samples, response), generator=generator)
    mask = torch.ones_like(responses, dtype=torch.bool)
    return Rollouts([text for text in texts for _ in range(samples)], responses, mask, mask.all(-1), 0)


def estimated(name: str, batch: tuple[int, int, int, int], phase: str, **changes) -> int:
    """Bytes of a phase without its logits. The other model's vocabulary of one token lets them decide the largest."""
    prompts, samples, prompt, response = batch
    shape = shape_of(PASSING[name].config)
    other = replace(shape, vocabulary=1)
    config = TrainConfig(
        prompts_per_step=prompts, group_size=samples, max_new_tokens=response, evaluation_prompts=1,
        measured_positions=1, micro_batch_tokens=prompts * samples * (prompt + response), **changes,
    )  # fmt: skip
    shapes, times = ((shape, other), 5) if phase == "update" else ((other, shape), 3)
    found = estimate_memory(config, *shapes, prompt_tokens=prompt, device="cpu").parts[phase]
    added = shape.vocabulary * shape.hidden * (6 if config.precision == "bfloat16" else 4) if phase == "update" else 0
    return found - times * 2**21 * shape.vocabulary * 4 - added  # logits, and what they add to a gradient


def kept(name: str, batch: tuple[int, int, int, int]) -> list[int]:
    """Bytes of each tensor that the layers keep for the backward pass, as the loop calls them, on rollouts."""
    own = {parameter.untyped_storage().data_ptr() for parameter in PASSING[name].parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert response_hidden_states(PASSING[name], written(*batch)).requires_grad
    return list(sizes.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_what_layers_keep_for_the_backward_pass_is_about_as_estimated(name, batch, precision, monkeypatch):
    expected = estimated(name, batch, "update", precision=precision)
    for shared in (True, False):  # a GPU has no layers that share prompts
        monkeypatch.setattr(policy, "can_share_prompts", lambda _, shared=shared: shared)
        with products_in(precision, torch.device("cpu")):
            ratio = sum(kept(name, batch)) / expected
        assert 0.9 < ratio < 1.35, (shared, ratio)


@pytest.mark.parametrize("name", [name for name in PASSING if "no shared" in name])
def test_plain_attention_keeps_one_tensor_of_scores_in_each_layer(name):
    for (prompts, samples, prompt, response), held in zip(BATCHES, (True, True, False), strict=True):
        of_responses = prompts * samples * 4 * (response - 1) * (prompt + response - 1) * 4
        assert kept(name, (prompts, samples, prompt, response)).count(of_responses) == (3 if held else 0)


@pytest.mark.parametrize("batch", BATCHES[:2])
@pytest.mark.parametrize("name", [name for name in PASSING if name not in MODELS])
def test_passes_of_layers_that_hold_scores_take_about_what_is_estimated(name, batch):
    """Forward and backward for the update, forward for the teacher."""
    model, rollouts = PASSING[name], written(*batch)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with Peak() as update:
        hidden = response_hidden_states(model, rollouts)
        hidden.backward(torch.ones_like(hidden))
    with torch.no_grad(), Peak() as teacher_pass:
        response_hidden_states(model, rollouts)
    measured = {"update": update.most, "teacher pass": teacher_pass.most}
    ratios = {phase: size / estimated(name, batch, phase) for phase, size in measured.items()}
    assert 0.8 < ratios["update"] < 1.2 and 0.6 < ratios["teacher pass"] < 1.2, ratios


def test_scores_by_hand():
    batch = (8, 4, 8, 60)
    tokens, heads, layers = 8 * 4 * 68, 4, 3
    # Sixty for each token, and eight by eight of each prompt; of three layers, and two more.
    held = heads * (tokens * 60 + 8 * 8 * 8) * 4
    name = "llama, no shared heads"

    def of_scores(phase: str, name: str = name, batch=batch, **changes) -> int:
        shape = shape_of(PASSING[name].config)
        layer = tokens_of(batch) * (2 * shape.hidden + shape.kept) * (2 if "precision" in changes else 4)
        if phase == "update" and "precision" in changes:  # the residual stream and what norms keep stay float32
            layer += tokens_of(batch) * (2 * shape.hidden * 2 + shape.normed * 4)
        return estimated(name, batch, phase, **changes) - layer * (layers if phase == "update" else 1)

    def tokens_of(batch) -> int:
        return batch[0] * batch[1] * (batch[2] + batch[3])

    assert tokens_of(batch) == tokens
    assert of_scores("update") == (layers + 2) * held and of_scores("teacher pass") == 3 * held
    # Longer ones are not held, but shorter ones of the same run are: 128 of each token, 128 × 128 of each prompt.
    long = (2, 4, 500, 160)
    assert of_scores("update", batch=long) == (layers + 2) * heads * (tokens_of(long) * 128 + 2 * 128 * 128) * 4
    # Nothing of heads that share keys, in bfloat16, or of weights that are not there.
    assert of_scores("update", "llama") == of_scores("update", precision="bfloat16") == 0
    assert of_scores("teacher pass", teacher_offload=True) == 0
    # Eager attention holds all of a row.
    assert of_scores("update", "eager") == (layers + 2) * heads * tokens * 68 * 4
    assert of_scores("update", "eager", precision="bfloat16") == (layers + 2) * heads * tokens * 68 * 6
    assert of_scores("teacher pass", "eager", precision="bfloat16") == 3 * heads * tokens * 68 * 6


def test_scores_are_not_held_where_activations_are_computed_again_or_on_a_gpu():
    shape = shape_of(PASSING["llama, no shared heads"].config)
    bare = replace(shape, plain_heads=0)
    assert shape.plain_heads == 4 and shape_of(MODELS["llama"].config).plain_heads == 0
    few = {"prompts_per_step": 1, "max_new_tokens": 60, "evaluation_prompts": 1, "micro_batch_tokens": 2**16}

    def total(model, device="cpu", **changes) -> int:
        return estimate_memory(TrainConfig(**few, **changes), model, bare, prompt_tokens=8, device=device).total

    assert total(shape) > total(bare)
    assert total(shape, gradient_checkpointing=True) == total(bare, gradient_checkpointing=True)
    assert total(shape, device="cuda") == total(bare, device="cuda")


# ── What a loss takes ───────────────────────────────────────────────────────────────────────────

GPU = torch.device("cuda")
VOCABULARY = 2**15  # of which 256 positions are projected at once
LOSSES = {
    **{name: make_method(name) for name in ("grpo", "rkl", "kdrl", "sft", "luffy", "tgpo", "tgpo-sampled", "tgpo-top-k",
                                            "tgpo-full", "tgpo-confidence", "exact-rkl", "forward-kl", "gkd")},
    "entropy bonus": make_method("grpo", entropy_bonus=0.1),
    "both": make_method("tgpo-full", entropy_bonus=0.1),
}  # fmt: skip


@pytest.fixture(scope="module")
def without_layers() -> Pair:
    """Student and teacher that are nearly all logits."""
    shape = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
             "num_attention_heads": 1}  # fmt: skip
    student, teacher = (LlamaForCausalLM(LlamaConfig(**shape)).eval() for _ in range(2))
    return Pair("", student, teacher.requires_grad_(False), None, VOCABULARY, [], None)


def logit_tensors(pair: Pair, method: Method, precision: str, measured: bool) -> float:
    """How many tensors of the size of a chunk's logits an update holds at its most: two samples and a trace."""
    device = torch.device("cpu")
    responses = torch.randint(5, 900, (3, 200), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(responses, dtype=torch.bool)
    rollouts = Rollouts([[3, 4]] * 3, responses, mask, mask.all(-1), 0)
    answers = ask_teacher(
        pair.teacher, rollouts, vocabulary_size=VOCABULARY, micro_batch_tokens=10**6, keep_distribution=mask,
        top_k=method.top_k, sampling_seed=0,
    )  # fmt: skip
    batch = Batch(rollouts, torch.tensor([False, False, True]), torch.tensor([0.0, 1.0, 1.0]), answers, None, 2, 200,
                  torch.Generator().manual_seed(0))  # fmt: skip
    rows = torch.arange(3)
    look = StepMeasurement(batch, rows, mask & measured, 4.0)
    autocast = functools.partial(products_in, precision, device)
    student_pass = StudentPass(batch, rows, pair, 1.0, autocast)
    terms = method.terms(batch, 0)
    pair.student.zero_grad()
    with Peak() as peak:
        accumulate_gradients([student_pass], terms, Accelerator(cpu=True), autocast, look.add)
    return peak.most / (positions_at_once(VOCABULARY, device) * VOCABULARY * 4)


@pytest.mark.parametrize("name, precision", [*((name, "float32") for name in LOSSES), ("gkd", "bfloat16")])
def test_an_update_holds_about_as_many_logits_as_are_counted(name, precision, without_layers):
    method = LOSSES[name]
    held = logit_tensors(without_layers, method, precision, measured=False)
    assert method.logit_tensors / 2 < held < method.logit_tensors + 0.2


def test_measuring_holds_five_tensors_besides(without_layers):
    assert logit_tensors(without_layers, LOSSES["grpo"], "float32", measured=True) == pytest.approx(6, abs=0.2)


def test_logits_are_estimated_as_often_as_the_method_holds_them_or_measures():
    shape = shape_of(QWEN["Qwen/Qwen2.5-Math-1.5B"])

    def tensors(method: str, measured: int) -> float:
        config = TrainConfig(method=make_method(method), measured_positions=measured, micro_batch_tokens=2**18,
                             prompts_per_step=16, group_size=8, max_new_tokens=80)  # fmt: skip
        return estimate_memory(config, shape, shape).parts["update"] / (positions_at_once(151_936, GPU) * 151_936 * 4)

    one = tensors("tgpo", 1)
    for method, measured, more in (("tgpo", 5120, 0), ("gkd", 1, 7), ("exact-rkl", 1, 3), ("tgpo", 9216, 0.5),
                                   ("tgpo", 0, 1), ("tgpo", 10**6, 1), ("gkd", 0, 7)):  # fmt: skip
        assert tensors(method, measured) - one == pytest.approx(more, abs=1e-6), (method, measured)


# ── Sizes ────────────────────────────────────────────────────────────────────────────────────────


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
