"""Decoding with tensors of fixed shape: the tokens of the growing path, and compiled where a compiler is."""

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tgpo_lab.errors import InputError
from tgpo_lab.models.pairs import load_pair
from tgpo_lab.sampling.cached_sampling import sample_responses
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
