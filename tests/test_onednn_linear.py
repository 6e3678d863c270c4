"""Products by oneDNN are those of torch.nn.Linear, and take its place where they are meant to alone."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tgpo_lab.models import onednn_linear, pairs
from tgpo_lab.models.onednn_linear import (
    LARGEST_WEIGHT,
    LEAST_MULTIPLY_ADDS,
    LEAST_NUMBERS,
    LEAST_ROWS,
    OneDnnLinear,
    is_plain_linear,
    linear,
    mkl_is_slow,
    product_by_onednn,
    suits_onednn,
    use_onednn,
)
from tgpo_lab.random_pair import Dimensions, RandomPair, paths_of, write_random_pair
from tgpo_lab.rollouts import Rollouts
from tgpo_lab.sampling.cached_sampling import sample_responses
from tgpo_lab.sampling.converted_weights import ConvertedWeights
from tgpo_lab.teacher import ask_teacher


class Convolutions:
    """Counts the convolutions that are run within its context, and those of them that oneDNN makes."""

    def __enter__(self):
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self._profiler.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._profiler.__exit__(*exception)
        counts = {event.key: event.count for event in self._profiler.key_averages()}
        self.number = counts.get("aten::convolution", 0)
        self.by_onednn = counts.get("aten::mkldnn_convolution", 0)


needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch comes without oneDNN here")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def every_product(monkeypatch, two_threads):
    """All products as convolutions, however small; PyTorch makes those below :data:`LEAST_NUMBERS` without oneDNN."""
    for name in ("LEAST_ROWS", "LEAST_MULTIPLY_ADDS", "LEAST_NUMBERS"):
        monkeypatch.setattr(onednn_linear, name, 1)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ── The product ──────────────────────────────────────────────────────────────────────────────────


def assert_as_in_float64(shape: tuple[int, ...], inner: int, columns: int, *, biased: bool, strided: bool) -> None:
    values = random(*shape, 2 * inner if strided else inner, seed=1)
    values = values[..., ::2] if strided else values  # as a view of other numbers' neighbours
    tensors = [values, random(columns, inner, seed=2)] + ([random(columns, seed=3)] if biased else [])
    single = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    double = [t.double().requires_grad_() for t in tensors]
    product, reference = product_by_onednn(*single), F.linear(*double)
    assert product.shape == reference.shape
    torch.testing.assert_close(product.double(), reference, rtol=1e-5, atol=1e-5 * inner)
    upstream = random(*reference.shape, seed=4)
    found = torch.autograd.grad(product, single, upstream)
    expected = torch.autograd.grad(reference, double, upstream.double())
    rows = product.numel() // columns
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5 * max(rows, columns) ** 0.5 * 5)


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    inner=st.integers(1, 70),
    columns=st.integers(1, 70),
    biased=st.booleans(),
    strided=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_value_and_gradients_are_those_of_a_float64_product(shape, inner, columns, biased, strided):
    assert_as_in_float64(shape, inner, columns, biased=biased, strided=strided)


@needs_onednn
@pytest.mark.parametrize("shape", [(641,), (7, 128), (640,), (3, 5, 67)])  # with 1, 0, 0 and 45 left over of 64
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_so_are_those_that_onednn_makes(shape, biased, strided, two_threads):
    with Convolutions() as convolutions:
        assert_as_in_float64(shape, 64, 96, biased=biased, strided=strided)
    # Value and gradient of the values. That of the weight has no name of its own among the operations.
    assert convolutions.number == convolutions.by_onednn == 2


def test_a_gradient_without_memory_of_its_own_and_one_that_is_not_asked_for(two_threads):
    values, weight = random(600, 64, seed=1).requires_grad_(), random(96, 64, seed=2)
    product_by_onednn(values, weight).sum().backward()  # which gives one number for all places
    torch.testing.assert_close(values.grad, weight.sum(0).expand(600, 64))
    values.grad, upstream = None, random(96, 600, seed=3)
    (product_by_onednn(values, weight).t() * upstream).sum().backward()  # which gives them in another order
    torch.testing.assert_close(values.grad, upstream.t() @ weight, rtol=1e-4, atol=1e-4)
    alone = weight.clone().requires_grad_()
    (product_by_onednn(values.detach(), alone).t() * upstream).sum().backward()
    torch.testing.assert_close(alone.grad, upstream @ values.detach(), rtol=1e-4, atol=1e-4)
    alone.grad = None
    product_by_onednn(values.detach(), alone).sum().backward()
    torch.testing.assert_close(alone.grad, values.detach().sum(0).expand(96, 64), rtol=1e-4, atol=1e-4)


def test_a_large_product_is_as_exact_as_the_usual_one(two_threads):
    values, weight = random(600, 512, seed=1), random(256, 512, seed=2)
    exact = values.double() @ weight.double().t()
    usual, ours = (
        (product.double() - exact).abs().max()
        for product in (F.linear(values, weight), product_by_onednn(values, weight))
    )
    assert ours < 3 * usual  # three digits worse if factors were rounded to bfloat16
    rounded = (values.bfloat16().float() @ weight.bfloat16().float().t()).double()
    assert (rounded - exact).abs().max() > 100 * ours


def test_the_same_product_has_the_same_bits(two_threads):
    values, weight = random(700, 256, seed=1), random(512, 256, seed=2)
    results = []
    for _ in range(3):
        layer = values.clone().requires_grad_(), weight.clone().requires_grad_()
        product = product_by_onednn(*layer)
        results.append((product.detach(), *torch.autograd.grad(product, layer, torch.ones_like(product))))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


# ── Which products ───────────────────────────────────────────────────────────────────────────────


def test_what_suits(two_threads):
    inner, columns = 2**9, 2**11
    assert suits_onednn(LEAST_ROWS, inner, columns)
    assert not suits_onednn(LEAST_ROWS - 1, inner, columns)
    rows = 2**13
    assert suits_onednn(rows, LEAST_MULTIPLY_ADDS // rows // 64, 64)
    narrow = LEAST_NUMBERS // 256
    assert suits_onednn(256, narrow + 1, 2**13) and suits_onednn(256, 2**13, narrow + 1)
    assert not suits_onednn(256, narrow, 2**13) and not suits_onednn(256, 2**13, narrow)
    assert not suits_onednn(rows - 1, LEAST_MULTIPLY_ADDS // rows // 64, 64)
    assert suits_onednn(rows, LARGEST_WEIGHT // 4, 4)
    assert not suits_onednn(rows, LARGEST_WEIGHT // 4 + 1, 4)
    torch.set_num_threads(1)
    assert not suits_onednn(LEAST_ROWS, inner, columns)


def layers(inner: int, columns: int) -> tuple[nn.Linear, OneDnnLinear]:
    usual = nn.Linear(inner, columns)
    model = nn.Sequential(copy.deepcopy(usual))
    use_onednn(model)
    return usual, model[0]


def test_only_products_that_suit_become_convolutions(two_threads):
    usual, ours = layers(512, 512)
    large, small = random(2, LEAST_ROWS // 2, 512), random(8, 512)
    assert suits_onednn(LEAST_ROWS, 512, 512)
    with Convolutions() as of_large:
        product = ours(large)
    with Convolutions() as of_small:
        assert torch.equal(ours(small), usual(small))
    assert (of_large.number, of_small.number) == (1, 0)
    assert of_large.by_onednn == torch.backends.mkldnn.is_available()
    torch.testing.assert_close(product, usual(large), rtol=1e-4, atol=1e-5)
    few, wide = random(4, LEAST_ROWS // 8, 4096), random(1024, 4096, seed=1)  # as many numbers, in half of the rows
    with Convolutions() as of_few:
        linear(few, wide)
    assert of_few.number == 0


def test_other_types_stay_as_they_were(two_threads):
    usual, ours = layers(512, 512)
    values = random(LEAST_ROWS, 512)
    with Convolutions() as convolutions:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ours(values), usual(values))
        for dtype in (torch.bfloat16, torch.float64):
            assert torch.equal(ours.to(dtype)(values.to(dtype)), usual.to(dtype)(values.to(dtype)))
    assert convolutions.number == 0
    with pytest.raises(RuntimeError, match="dtype"):  # not a product of mixed types, which nn.Linear refuses, too
        ours(values)


def test_no_rows_make_no_product(every_product):
    _, ours = layers(8, 4)
    assert ours(torch.empty(0, 8)).shape == (0, 4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_layers_are_left_to_the_compiler(every_product):
    usual, ours = layers(64, 96)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    values = random(600, 64)
    with Convolutions() as convolutions:
        assert torch.equal(compiled(values), usual(values))
    assert convolutions.number == 0
    with Convolutions() as convolutions:
        linear(values, ours.weight, ours.bias)
    assert convolutions.number == 1


# ── Whole models ─────────────────────────────────────────────────────────────────────────────────


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


class Quantised(nn.Linear):
    """Stands in for a layer that keeps its weights in another form."""


def test_a_model_keeps_names_weights_and_every_other_layer():
    model = tiny()
    model.model.layers[0].mlp.up_proj.__class__ = Quantised
    weights = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    use_onednn(model)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == weights
    kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert kinds.pop("model.layers.0.mlp.up_proj") is Quantised
    assert set(kinds.values()) == {OneDnnLinear}
    assert "lm_head" in kinds
    assert not is_plain_linear(model.model.layers[0].mlp.up_proj)


def test_copies_have_weights_of_their_own(every_product):
    _, ours = layers(8, 4)
    values = random(3, 8)
    before = ours(values)
    kept = io.BytesIO()
    pickle.dump(ours, kept)
    copied, read = copy.deepcopy(ours), pickle.loads(kept.getvalue())
    with torch.no_grad():
        ours.weight.zero_()
    assert type(copied) is type(read) is OneDnnLinear
    assert torch.equal(copied(values), before)
    assert torch.equal(read(values), before)


def test_sampling_teacher_and_gradient_are_the_same_but_for_rounding(every_product):
    usual = tiny()
    ours = copy.deepcopy(usual)
    use_onednn(ours)
    prompts = [[1, 2, 3], [4, 5]]

    def sampled(model: LlamaForCausalLM) -> Rollouts:
        return sample_responses(model, prompts, 6, [0], 0, samples_per_prompt=4,
                                generator=torch.Generator().manual_seed(0))  # fmt: skip

    with Convolutions() as convolutions:
        rollouts = sampled(ours)
    assert convolutions.number > 6 * (2 * 4 + 1)  # of each token, joined projections included
    assert torch.equal(sampled(usual).responses, rollouts.responses)
    answers = [ask_teacher(m, rollouts, vocabulary_size=64, micro_batch_tokens=32) for m in (usual, ours)]
    assert torch.equal(answers[0].tokens, answers[1].tokens)
    torch.testing.assert_close(answers[0].logprobs, answers[1].logprobs)
    tokens, _ = rollouts.sequences()
    for model in (usual, ours):
        model(tokens).logits.logsumexp(-1).sum().backward()
    for (name, one), two in zip(usual.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_weights_converted_for_autocast_are_those_of_all_layers():
    usual, ours = ConvertedWeights(tiny()), tiny()
    use_onednn(ours)
    assert len(ConvertedWeights(ours)._layers) == len(usual._layers) == 2 * 7 + 1


# ── Where ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("slow", [True, False])
def test_loaded_models_have_these_layers_where_mkl_is_slow(slow, tmp_path, monkeypatch):
    write_random_pair(RandomPair(Dimensions(16, 1, 2), Dimensions(16, 1, 2), 64, 4), tmp_path, precision="float32")
    monkeypatch.setattr(pairs, "mkl_is_slow", lambda: slow)
    model = pairs.load_model(paths_of(tmp_path)["student"], torch.float32, "cpu")
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {OneDnnLinear if slow else nn.Linear}


@pytest.mark.parametrize(
    "processor, vectors, mkl, onednn, slow",
    [
        ("AMD EPYC", "AVX512", True, True, True),
        ("AMD Ryzen 9 9950X", "AVX512", True, True, True),
        ("AMD EPYC", "AVX2", True, True, False),
        ("Intel Xeon", "AVX512", True, True, False),
        ("AMD EPYC", "AVX512", False, True, False),
        ("AMD EPYC", "AVX512", True, False, False),
    ],
)
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_which_machines_those_are(processor, vectors, mkl, onednn, slow, monkeypatch):
    monkeypatch.setattr(onednn_linear, "processor_name", lambda: processor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    assert mkl_is_slow() is slow
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        assert not mkl_is_slow()
