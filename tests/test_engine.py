"""Engines: the loop's own, and vLLM's through a stand-in with its interface (tests/stand_in_vllm)."""

import copy
import importlib.util
import math
import shutil

import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from tgpo_lab.config import TrainConfig
from tgpo_lab.diagnostics.logprob_noise import response_logprobs
from tgpo_lab.errors import InputError, RunError
from tgpo_lab.metrics import read_rows
from tgpo_lab.models.lora import add_adapters
from tgpo_lab.models.pairs import load_pair
from tgpo_lab.sampling import vllm_engine
from tgpo_lab.sampling.cached_sampling import sample_responses
from tgpo_lab.sampling.engine import OwnEngine
from tgpo_lab.sampling.vllm_engine import VLLMEngine, checkpoint_weights, require_vllm
from tgpo_lab.training import train

PROMPTS = ["47+85+36=", "7+8=", "12+34+56+78="]
ENDS = list(range(0, 2048, 4))


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pair(untied_student, random_pair):
    return load_pair(untied_student, random_pair.teacher)


def sampled(engine, pair, prompts=PROMPTS, tokens=8, ends=ENDS, **options):
    options = {"temperature": 0.8, "samples_per_prompt": 6, "generator": generator(), **options}
    with engine.load_weights():
        return engine.sample(pair.encode(prompts), tokens, ends, 0, **options)


def changed(pair, factor: float = 1.3) -> None:
    """An update of the student, in place."""
    with torch.no_grad():
        for parameter in pair.student.parameters():
            parameter.mul_(factor)


# ── Both engines ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(params=["own", "own compiled shapes", "vllm", "vllm asleep"])
def engine(request, pair, vllm):
    if request.param == "own":
        return OwnEngine(pair.student)
    if request.param == "own compiled shapes":
        from tgpo_lab.sampling.fixed_shape_decoding import FixedShapeDecoder

        own = OwnEngine(pair.student)
        own._decoder = FixedShapeDecoder(pair.student, compiled=False)
        return own
    return VLLMEngine(pair.student, max_length=40, precision="float32", sleep=request.param == "vllm asleep")


def test_logprobs_are_those_of_the_student_after_each_update(engine, pair):
    before = sampled(engine, pair)
    for factor in (1.3, 0.7):
        changed(pair, factor)
        rollouts = sampled(engine, pair)
        wanted = response_logprobs(pair.student, rollouts, 0.8, pair.vocabulary_size, 4096)
        torch.testing.assert_close(rollouts.logprobs, wanted.detach(), rtol=1e-4, atol=2e-5)
        assert not torch.equal(rollouts.responses[:, :1], before.responses[:, :1])


def test_masks_ends_and_groups(engine, pair):
    rollouts = sampled(engine, pair)
    assert rollouts.prompts == [prompt for prompt in pair.encode(PROMPTS) for _ in range(6)]
    assert rollouts.responses.dtype == torch.long and rollouts.mask.dtype == rollouts.finished.dtype == torch.bool
    assert rollouts.responses.shape[1] == int(rollouts.lengths.max())
    assert 0 < int(rollouts.finished.sum()) < len(rollouts), "take other ends: both kinds are needed"
    for row, length in enumerate(rollouts.lengths.tolist()):
        tokens = rollouts.responses[row].tolist()
        assert all(token % 4 for token in tokens[: length - 1])
        assert bool(rollouts.finished[row]) == (tokens[length - 1] % 4 == 0)
        assert bool(rollouts.finished[row]) or length == 8
        assert tokens[length:] == [0] * (len(tokens) - length)
        assert rollouts.mask[row].tolist() == [t < length for t in range(len(tokens))]
        assert rollouts.logprobs[row, length:].tolist() == [0.0] * (len(tokens) - length)


def test_samples_of_a_group_differ_and_the_seed_decides(engine, pair):
    options = {"ends": [1], "tokens": 6, "temperature": 2.0}
    first, again = sampled(engine, pair, **options), sampled(engine, pair, **options)
    assert torch.equal(first.responses, again.responses)
    assert not torch.equal(first.responses, sampled(engine, pair, generator=generator(6), **options).responses)
    for start in range(0, 18, 6):
        assert len({tuple(row) for row in first.responses[start : start + 6].tolist()}) == 6


def test_a_share_of_the_prompts_gets_what_it_gets_among_all(engine, pair):
    options = {"ends": [1], "tokens": 6}
    whole = sampled(engine, pair, **options)
    part = sampled(engine, pair, prompts=PROMPTS[1:2], first=1, of=3, **options)
    assert torch.equal(part.responses, whole.responses[6:12])


def test_ids_beyond_the_shared_vocabulary_are_never_written_and_get_no_probability(engine, pair):
    rollouts = sampled(engine, pair, vocabulary_size=50, ends=[1])
    assert int(rollouts.responses.max()) < 50
    wanted = response_logprobs(pair.student, rollouts, 0.8, 50, 4096)
    torch.testing.assert_close(rollouts.logprobs, wanted.detach(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_vllms_copy_lacks_the_rows_of_other_ids(pair, random_pair, vllm, monkeypatch, tied):
    if tied:
        pair = load_pair(random_pair.student, random_pair.teacher)
        monkeypatch.setattr(vllm_engine, "require_renewable_weights", lambda student, device: None)
    asked = []
    true = vllm.SamplingParams
    monkeypatch.setattr(vllm, "SamplingParams", lambda **options: asked.append(options) or true(**options))
    engine = VLLMEngine(pair.student, max_length=40, precision="float32", vocabulary_size=50)
    for factor in (1.0, 1.3):
        changed(pair, factor)
        rollouts = sampled(engine, pair, vocabulary_size=50, ends=[1, 49, 50])
        assert int(rollouts.responses.max()) < 50
        wanted = response_logprobs(pair.student, rollouts, 0.8, 50, 4096)
        torch.testing.assert_close(rollouts.logprobs, wanted.detach(), rtol=1e-4, atol=2e-5)
    given = vllm.RELOADS[-1]
    assert ("lm_head.weight" in given) != tied
    whole = dict(pair.student.named_parameters())
    for name, weight in given.items():
        by_token = name in ("lm_head.weight", "model.embed_tokens.weight")
        assert torch.equal(weight, whole[name][:50] if by_token else whole[name]), name
    assert {options["allowed_token_ids"] for options in asked} == {None}  # no list for each request
    assert {tuple(options["stop_token_ids"]) for options in asked} == {(1, 49)}


def test_of_a_text_configuration_within_another_ids_are_forbidden_in_each_request(pair, vllm, monkeypatch):
    inner = copy.deepcopy(pair.student.config)
    monkeypatch.setattr(type(pair.student.config), "get_text_config", lambda self, **options: inner)
    engine = VLLMEngine(pair.student, max_length=40, precision="float32", vocabulary_size=50)
    rollouts = sampled(engine, pair, vocabulary_size=50, ends=[1])
    assert int(rollouts.responses.max()) < 50 and vllm.RELOADS[-1]["lm_head.weight"].shape[0] == 2048
    wanted = response_logprobs(pair.student, rollouts, 0.8, 50, 4096)
    torch.testing.assert_close(rollouts.logprobs, wanted.detach(), rtol=1e-4, atol=2e-5)


def test_greedy_is_greedy_and_has_no_logprobs(engine, pair):
    options = {"temperature": 0.0, "samples_per_prompt": 1, "generator": None}
    rollouts = sampled(engine, pair, **options)
    wanted = sample_responses(pair.student, pair.encode(PROMPTS), 8, ENDS, 0, temperature=0.0)
    assert torch.equal(rollouts.responses, wanted.responses) and torch.equal(rollouts.mask, wanted.mask)
    assert rollouts.logprobs is None


def test_the_first_token_follows_the_distribution(engine, pair):
    rollouts = sampled(engine, pair, prompts=["7+8="], tokens=1, samples_per_prompt=500, vocabulary_size=20,
                       temperature=2.0)  # fmt: skip
    with torch.no_grad():
        logits = pair.student(torch.tensor(pair.encode(["7+8="]))).logits[0, -1, :20].double()
    expected = (logits / 2.0).softmax(-1) * 500
    observed = torch.bincount(rollouts.responses[:, 0], minlength=20).double()
    assert int((expected > 5).sum()) > 5
    likely = expected > 5
    expected = expected[likely] * observed[likely].sum() / expected[likely].sum()
    observed = observed[likely]
    assert chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3


def test_sampling_without_a_generator_is_refused(engine, pair):
    with pytest.raises(ValueError, match="needs a generator"):
        sampled(engine, pair, generator=None)


# ── vLLM alone ───────────────────────────────────────────────────────────────────────────────────


def test_asleep_it_takes_no_weights_and_gives_no_responses(pair, vllm):
    """On a GPU its memory belongs to others then."""
    engine = VLLMEngine(pair.student, max_length=40, precision="float32", sleep=True)
    sampled(engine, pair)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        engine.sample(pair.encode(PROMPTS), 8, ENDS, 0, generator=generator())
    with pytest.raises(RuntimeError, match="illegal memory access"):
        engine._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": checkpoint_weights(pair.student)})


def test_the_models_own_end_token_does_not_end_a_response_that_others_end(pair, vllm):
    pair.student.config.eos_token_id = 1
    engine = VLLMEngine(pair.student, max_length=40, precision="float32")
    rollouts = sampled(engine, pair, prompts=["7+8="], samples_per_prompt=40, vocabulary_size=8, ends=[7])
    inside = rollouts.responses[:, :-1][rollouts.mask[:, 1:]]  # those that another token follows
    assert (inside == 1).any(), "no sample has the model's end token inside: take another seed"


def test_samples_stand_in_the_order_of_their_seeds(pair, vllm):
    """Not as they finish: the first three of six are the three of three."""
    engine = VLLMEngine(pair.student, max_length=40, precision="float32")
    options = {"prompts": PROMPTS[:1], "tokens": 6, "temperature": 2.0, "ends": [1]}
    six, three = (sampled(engine, pair, samples_per_prompt=n, **options) for n in (6, 3))
    assert torch.equal(six.responses[:3], three.responses)


def test_end_tokens_that_no_model_can_write_are_left_out(pair, vllm):
    engine = VLLMEngine(pair.student, max_length=40, precision="float32")
    assert not sampled(engine, pair, ends=[2048]).finished.any()


def test_a_response_that_did_not_end_is_not_taken(pair, vllm, monkeypatch):
    engine = VLLMEngine(pair.student, max_length=40, precision="float32")
    complete = vllm.LLM._complete

    def aborted(self, prompt, params, index):
        output = complete(self, prompt, params, index)
        output.finish_reason = "abort"
        return output

    monkeypatch.setattr(vllm.LLM, "_complete", aborted)
    sentence = (
        r"^vLLM gave 18 of 18 responses back, ended by abort; expected .*; checkpoints .* go on from the last one"
    )
    with pytest.raises(RunError, match=sentence):
        sampled(engine, pair)


@pytest.mark.parametrize("error", [ValueError("bad request"), KeyError("row"), RuntimeError("CUDA error: unspecified")])
def test_a_failure_within_vllm_is_one_sentence(pair, vllm, monkeypatch, error):
    def failing(self, *arguments, **options):
        raise error

    engine = VLLMEngine(pair.student, max_length=40, precision="float32")
    monkeypatch.setattr(vllm.LLM, "generate", failing)
    with pytest.raises(RunError, match=rf"^vLLM failed while it sampled \({type(error).__name__}: .*\); checkpoints"):
        sampled(engine, pair)
    monkeypatch.setattr(vllm.LLM, "__init__", failing)
    expected = InputError if isinstance(error, ValueError) else RunError
    with pytest.raises(expected, match=r"^vLLM (does not start with|failed while it started)"):
        VLLMEngine(pair.student, max_length=40, precision="float32")


@pytest.mark.parametrize("text", ["CUDA out of memory", "[gloo/transport/tcp/pair.cc:1] Connection closed by peer"])
def test_what_the_loop_tells_itself_is_left_to_it(pair, vllm, monkeypatch, text):
    def failing(self, *arguments, **options):
        raise RuntimeError(text)

    engine = VLLMEngine(pair.student, max_length=40, precision="float32")
    monkeypatch.setattr(vllm.LLM, "generate", failing)
    with pytest.raises(RuntimeError) as caught:
        sampled(engine, pair)
    assert str(caught.value) == text


def test_what_is_cached_of_older_weights_is_not_sampled_with(pair, vllm, monkeypatch):
    engine = VLLMEngine(pair.student, max_length=40, precision="float32")
    monkeypatch.setattr(vllm.LLM, "reset_prefix_cache", lambda self: False)
    with pytest.raises(
        RunError, match=r"^vLLM did not drop its prefix cache, .*; checkpoints .* go on from the last one"
    ):
        sampled(engine, pair)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs the extra lora")
def test_merged_adapters_are_what_vllm_gets(pair, vllm):
    add_adapters(pair.student, rank=2, alpha=8.0, seed=0)
    with torch.no_grad():
        for name, parameter in pair.student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=generator())
    names = {name for name, _ in checkpoint_weights(pair.student)}
    assert names == set(AutoModelForCausalLM.from_pretrained(pair.student.name_or_path).state_dict())
    engine = VLLMEngine(pair.student, max_length=40, precision="float32")
    rollouts = sampled(engine, pair)
    wanted = response_logprobs(pair.student, rollouts, 0.8, pair.vocabulary_size, 4096)
    torch.testing.assert_close(rollouts.logprobs, wanted.detach(), rtol=1e-4, atol=2e-5)


def test_a_student_too_short_for_the_prompts_is_one_sentence(pair, vllm):
    with pytest.raises(InputError, match=r"^vLLM does not start with .*untied.*max_model_len \(500\)"):
        VLLMEngine(pair.student, max_length=500)


def test_a_tied_student_on_a_cpu_is_refused(random_pair, vllm):
    pair = load_pair(random_pair.student, random_pair.teacher)
    with pytest.raises(InputError, match="tied to the embeddings"):
        VLLMEngine(pair.student, max_length=40)


def test_a_missing_vllm_is_one_sentence(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^engine is vllm, but vLLM is not installed: pip install 'tgpo-lab\[vllm\]'"):
        train(tiny_config(tmp_path, engine="vllm"), show_progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("version", ["0.30.2", "0.32.0", "1.31.0", "dev"])
def test_another_version_is_one_sentence(vllm, monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(InputError, match=rf"installed vLLM is {version}; expected 0\.31 or later, before 0\.32"):
        require_vllm()
    monkeypatch.setattr(vllm, "__version__", "0.31.1+cpu")
    require_vllm()


def test_a_run_with_vllm_learns_evaluates_and_goes_on_as_if_not_stopped(tiny_config, tmp_path, untied_student, vllm):
    changes = {"engine": "vllm", "student": str(untied_student), "importance_cap": 2.0, "steps": 4}
    whole = train(tiny_config(tmp_path, **changes, output=str(tmp_path / "whole")), show_progress=False)
    row = read_rows(tmp_path / "whole" / "metrics.jsonl")[1]
    assert row["engine_difference"] < 1e-5 and row["importance_truncated"] == 0.0
    config = tiny_config(tmp_path, **changes, output=str(tmp_path / "parts"))
    train(config.with_changes(steps=2), show_progress=False)
    (tmp_path / "parts" / "config.json").write_text((tmp_path / "whole" / "config.json").read_text().replace(
        str(tmp_path / "whole"), str(tmp_path / "parts")))  # fmt: skip
    resumed = train(config, resume=True, show_progress=False)
    for a, b in zip(whole.student.parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_goes_on_with_another_share_of_the_memory_and_the_same_numbers(
    tiny_config, tmp_path, untied_student, vllm
):
    changes = {"engine": "vllm", "student": str(untied_student)}
    train(tiny_config(tmp_path, **changes, steps=2), show_progress=False)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    same, other = (
        train(tiny_config(tmp_path, **changes, steps=4, output=str(tmp_path / name), **memory), resume=True,
              show_progress=False)
        for name, memory in (("run", {}), ("copy", {"vllm_memory_share": 0.2, "vllm_sleep": True}))
    )  # fmt: skip
    for a, b in zip(same.student.parameters(), other.student.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(InputError, match="was made with engine='vllm', not 'own'"):
        train(tiny_config(tmp_path, steps=5, student=str(untied_student)), resume=True, show_progress=False)


def test_compiled_decoding_is_not_changed_on_a_resume(tiny_config, tmp_path):
    train(tiny_config(tmp_path), show_progress=False)
    with pytest.raises(InputError, match="was made with compile_decoding=False, not True"):
        train(tiny_config(tmp_path, compile_decoding=True), resume=True, show_progress=False)


def test_stale_weights_show_in_the_measured_difference(tiny_config, tmp_path, untied_student, vllm, monkeypatch):
    monkeypatch.setattr(vllm.LLM, "reset_prefix_cache", lambda self: True)
    config = tiny_config(tmp_path, engine="vllm", student=str(untied_student))
    train(config, show_progress=False)
    assert read_rows(tmp_path / "run" / "metrics.jsonl")[1]["engine_difference"] > 0.01


# ── Configuration ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"importance_cap": 0.5}, "importance_cap must be 1 or more"),
        ({"importance_cap": math.nan}, "importance_cap must be 1 or more"),
        ({"vllm_memory_share": 0.0}, "vllm_memory_share must be above 0 and at most 1"),
        ({"vllm_memory_share": 1.5}, "vllm_memory_share must be above 0 and at most 1"),
        ({"engine": "vllm", "compile_decoding": True}, "compile_decoding is an option of the own engine"),
        ({"engine": "vllm", "temperature": 3.0}, "temperature must be from 0.01 to 2 with vllm"),
        ({"engine": "vllm", "evaluation_temperature": 0.001}, "evaluation_temperature must be from 0.01 to 2"),
        ({"vllm_sleep": True}, "vllm_sleep is an option of vllm"),
        ({"engine": "sglang"}, "engine must be own or vllm, but is 'sglang'"),
    ],
)
def test_impossible_options_are_one_sentence(changes, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**changes)
