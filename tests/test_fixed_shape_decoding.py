"""Decoding with tensors of fixed shape: the tokens of the growing path, and compiled where a compiler is."""

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from tgpo_lab.errors import InputError
from tgpo_lab.models.pairs import load_pair
from tgpo_lab.sampling.cached_sampling import sample_responses
from tgpo_lab.sampling.converted_weights import ConvertedWeights
from tgpo_lab.sampling.decoding import KnownLayers, preallocated_cache
from tgpo_lab.sampling.engine import OwnEngine
from tgpo_lab.sampling.fixed_shape_decoding import FixedShapeDecoder
from tgpo_lab.training import train

PROMPTS = ["47+85+36=", "7+8=", "12+34+56+78="]
COMPILER = shutil.which("g++") and Path(sysconfig.get_paths()["include"], "Python.h").exists()


@pytest.fixture(params=["student", "teacher"])
def model(request, random_pair):
    """Llama, then Qwen3 with its norms of queries and keys."""
    return getattr(load_pair(random_pair.student, random_pair.teacher), request.param).requires_grad_(False)


@pytest.fixture(scope="module")
def pair(random_pair):
    return load_pair(random_pair.student, random_pair.teacher)


def sample(model, pair, decoder, texts=PROMPTS, tokens=20, ends=(1, 4, 8), **options):
    options = {"temperature": 1.0, "samples_per_prompt": 5, **options}
    generator = torch.Generator().manual_seed(3) if options["temperature"] else None
    return sample_responses(
        model, pair.encode(texts), tokens, list(ends), 0, generator=generator, decoder=decoder, **options
    )


def assert_same(one, other) -> None:
    assert torch.equal(one.responses, other.responses) and torch.equal(one.mask, other.mask)
    assert torch.equal(one.finished, other.finished)
    if one.logprobs is not None:
        torch.testing.assert_close(one.logprobs, other.logprobs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"texts": PROMPTS[:1]}, {"ends": range(0, 2048, 2)}])
def test_tokens_are_those_of_the_growing_path(model, pair, options):
    assert_same(
        sample(model, pair, FixedShapeDecoder(model, compiled=False), **options), sample(model, pair, None, **options)
    )


def test_buffers_are_used_again_and_keep_nothing_of_the_batch_before(model, pair):
    decoder = FixedShapeDecoder(model, compiled=False)
    longest = ["12+34+56+78="] * 3
    for texts in (longest, PROMPTS, longest, PROMPTS[:1]):  # the last has other numbers of rows
        assert_same(sample(model, pair, decoder, texts=texts), sample(model, pair, None, texts=texts))
        (reader,) = decoder._readers.values()
        for layer in reader._layers:  # so that whatever is left over would show
            layer.keys[:, :, 40:] = torch.nan
            layer.values[:, :, 40:] = torch.nan


def test_an_update_of_the_weights_is_seen(pair, random_pair):
    model = load_pair(random_pair.student, random_pair.teacher).student
    decoder = FixedShapeDecoder(model, compiled=False)
    sample(model, pair, decoder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    assert_same(sample(model, pair, decoder), sample(model, pair, None))


def test_shared_heads_of_keys_and_autocast(pair):
    config = AutoConfig.for_model(
        "qwen2", vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    assert_same(sample(model, pair, FixedShapeDecoder(model, compiled=False)), sample(model, pair, None))
    with torch.autocast("cpu", torch.bfloat16):
        found = sample(model, pair, FixedShapeDecoder(model, compiled=False), temperature=0.0)
        wanted = sample(model, pair, None, temperature=0.0)
    assert torch.equal(found.responses[:, 0], wanted.responses[:, 0])  # later ones may differ: sums of bfloat16


# ── Weights converted once ───────────────────────────────────────────────────────────────────────


class Conversions(TorchDispatchMode):
    """Counts conversions of float32 matrices to bfloat16, but for activations, which have the rows of the batch."""

    def __init__(self, rows):
        super().__init__()
        self.rows, self.count = rows, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "_to_copy" in str(func) and args[0].ndim == 2 and args[0].dtype == torch.float32:
            self.count += result.dtype == torch.bfloat16 and args[0].shape[0] not in self.rows
        return result


def autocast(enabled=True):
    # Without its own cache it converts at every product, as it does within compiled layers.
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled, cache_enabled=False)


def test_converted_weights_change_no_number_and_are_converted_once(model, pair):
    decoder = FixedShapeDecoder(model, compiled=False)
    matrices = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    with autocast():
        wanted = sample(model, pair, decoder)
        with ConvertedWeights(model).renewed("cpu"):
            assert all(m.weight.dtype == torch.bfloat16 for m in matrices)
            assert model.get_input_embeddings().weight.dtype == torch.float32  # though it is the output layer's, too
            found = sample(model, pair, decoder)
    assert torch.equal(found.responses, wanted.responses) and torch.equal(found.logprobs, wanted.logprobs)
    with torch.no_grad(), autocast():
        cache, rows = preallocated_cache(model, 8), {3, 24}
        model.base_model(torch.ones(3, 7, dtype=torch.long), past_key_values=cache, use_cache=True)
        read = KnownLayers(model, cache, 8, join=False)
        one = torch.ones(3, dtype=torch.long), torch.full((3,), 7), None
        with Conversions(rows) as without:
            read(*one)
        cache.layers[0].filled = cache.layers[1].filled = 7
        with ConvertedWeights(model).renewed("cpu"), Conversions(rows) as converted:
            read(*one)
    assert without.count >= 7 * len(cache.layers) and converted.count == 0


def test_without_fixed_shapes_autocast_converts_each_weight_once_for_all_tokens(model, pair):
    model.requires_grad_(True)  # as a student is; of frozen weights it remembers nothing
    matrices = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    counts = []
    for tokens in (2, 8):
        with torch.autocast("cpu", torch.bfloat16), Conversions({3, 15}) as converted:
            found = sample(model, pair, None, tokens=tokens, ends=[2048])
        assert found.lengths.tolist() == [tokens] * 15  # all rows stay
        counts.append(converted.count)
    # Those that are joined for single tokens are converted once more.
    assert len(matrices) <= counts[0] == counts[1] <= 2 * len(matrices)


def test_a_model_has_its_own_weights_back_and_copies_follow_them_in_place(random_pair, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda read, **options: read)
    pair = load_pair(random_pair.student, random_pair.teacher)
    student, layer = pair.student, pair.student.base_model.layers[0].mlp.up_proj
    own, engine = dict(student.named_parameters()), OwnEngine(student, compile_decoding=True)
    places = set()
    for factor in (1.0, 1.5):
        with torch.no_grad():
            layer.weight.mul_(factor)
        with pytest.raises(KeyboardInterrupt), autocast(), engine.load_weights():
            assert torch.equal(layer.weight, own["model.layers.0.mlp.up_proj.weight"].bfloat16())
            places.add(layer.weight.data_ptr())
            raise KeyboardInterrupt
        assert {name: id(p) for name, p in student.named_parameters()} == {name: id(p) for name, p in own.items()}
    assert len(places) == 1
    with engine.load_weights():  # in float32 nothing is converted
        assert layer.weight is own["model.layers.0.mlp.up_proj.weight"]


@pytest.mark.skipif(not COMPILER, reason="torch.compile needs a C++ compiler and Python's headers")
def test_compiled_on_a_cpu_tokens_are_the_same(pair, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # a shared one may hold what a killed process left
    model = pair.student
    decoder = FixedShapeDecoder(model, compiled=True)
    for _ in range(2):
        assert_same(sample(model, pair, decoder, tokens=6), sample(model, pair, None, tokens=6))


@pytest.mark.parametrize(
    "name, options", [("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 2}), ("mistral", {"sliding_window": 8})]
)
def test_other_architectures_are_refused_in_one_sentence(name, options):
    shape = {} if name == "gpt2" else {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
                                       "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, vocab_size=64, **shape, **options))
    with pytest.raises(InputError, match=f"the student is a {type(model).__name__}"):
        FixedShapeDecoder(model, compiled=True)


def test_looking_seldom_at_what_has_finished_changes_no_token(pair, monkeypatch):
    """As on a GPU; there are rows that end at each place, and all end before the limit."""
    from tgpo_lab.sampling import cached_sampling

    wanted = sample(pair.student, pair, None, ends=range(0, 2048, 2), tokens=40)
    assert wanted.finished.all() and len(set(wanted.lengths.tolist())) == 3
    for every in (3, 16, 100):
        monkeypatch.setattr(cached_sampling, "LOOK_EVERY", {"cpu": every})
        assert_same(sample(pair.student, pair, None, ends=range(0, 2048, 2), tokens=40), wanted)


def test_a_run_with_compiled_decoding(tiny_config, tmp_path, monkeypatch):
    """The layers are traced whole, but not compiled: that would take minutes."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda read, **options: compiler(read, backend="eager", fullgraph=True))
    config = tiny_config(tmp_path, output=str(tmp_path / "plain"), steps=2, evaluate_every=0)
    plain = train(config, show_progress=False)
    torch._dynamo.utils.counters.clear()
    config = config.with_changes(output=str(tmp_path / "c"), compile_decoding=True)
    traced = train(config, show_progress=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for a, b in zip(plain.student.parameters(), traced.student.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
