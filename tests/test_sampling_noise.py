"""The doctor's sampling noise: of the path that the run samples by, whichever it is, against the update."""

import json
import re
from dataclasses import replace

import pytest
import torch

from tgpo_lab.diagnostics import logprob_noise
from tgpo_lab.doctor.diagnose import diagnose
from tgpo_lab.doctor.numeric_checks import check_sampling
from tgpo_lab.errors import InputError
from tgpo_lab.models.pairs import load_pair
from tgpo_lab.sampling import cached_sampling, engine
from tgpo_lab.sampling.engine import OwnEngine
from tgpo_lab.sampling.fixed_shape_decoding import FixedShapeDecoder
from tgpo_lab.training import train


@pytest.fixture
def examine(tiny_config, tmp_path):
    """A function that examines the random pair with some settings changed and gives the finding on sampling."""

    def run(**changes):
        found = diagnose(tiny_config(tmp_path, **changes), prompts=4, device="cpu")
        (finding,) = [f for f in found.findings if f.subject == "sampling noise"]
        (other,) = [f for f in found.findings if f.subject == "self-distillation"]
        assert other.level == "ok"
        return finding

    return run


@pytest.fixture
def off(vllm, monkeypatch):
    """A function that lets vLLM name log-probabilities that are off by so much, by turns more and less."""

    def make(amount: float) -> None:
        complete = vllm.LLM._complete

        def shifted(self, *arguments):
            output = complete(self, *arguments)
            for place, at in enumerate(output.logprobs):
                for value in at.values():
                    value.logprob += amount * (-1) ** place
            return output

        monkeypatch.setattr(vllm.LLM, "_complete", shifted)

    return make


@pytest.fixture
def traced(monkeypatch):
    """Compiled decoding goes the same way, traced whole but not compiled: that would take minutes."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda read, **options: compiler(read, backend="eager", fullgraph=True))


def test_both_sides_are_the_plain_forward_pass_at_the_runs_temperature(random_pair):
    """What an engine says and what the update computes, each against transformers in double precision."""
    pair = replace(load_pair(random_pair.student, random_pair.teacher), vocabulary_size=2000)
    rollouts = OwnEngine(pair.student).sample(
        pair.encode(["1+2+4=", "7+0+0="]), 8, [1], 0, temperature=0.7, vocabulary_size=2000,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    updated = logprob_noise.response_logprobs(pair.student, rollouts, 0.7, 2000, 10**6).detach()
    largest = 0.0
    for row, length in enumerate(rollouts.lengths.tolist()):
        prompt, response = rollouts.prompts[row], rollouts.responses[row, :length]
        tokens = torch.cat([torch.tensor(prompt), response]).unsqueeze(0)
        with torch.no_grad():
            logits = pair.student(tokens).logits[0, len(prompt) - 1 : -1, :2000].double()
        plain = (logits / 0.7).log_softmax(-1).gather(-1, response.unsqueeze(-1)).squeeze(-1)
        for found in (rollouts.logprobs, updated):
            torch.testing.assert_close(found[row, :length].double(), plain, atol=1e-4, rtol=0)
        largest = max(largest, float((rollouts.logprobs - updated)[row, :length].abs().max()))
    noise = logprob_noise.sampling_noise(pair, rollouts, 0.7, torch.no_grad, 10**6)
    assert 0 <= noise.mean <= noise.largest == pytest.approx(largest, abs=1e-7) and largest < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_own_sampling_is_named_with_where_and_at_what_temperature_it_was_measured(examine, temperature):
    finding = examine(temperature=temperature)
    assert finding.level == "ok" and re.fullmatch(
        rf"Own sampling against the update, on the CPU: \|Δ log πθ\| is \S+e-0\d nats in the mean, \S+ at most, at "
        rf"temperature {temperature:g}\. What it is on a GPU was not measured\.",
        finding.text,
    )


def test_own_sampling_that_computes_something_else_is_refused(examine, monkeypatch):
    reader = cached_sampling.next_hidden

    def another_token(*arguments):
        read = reader(*arguments)
        return lambda tokens, positions, visible: read((tokens + 1) % 2048, positions, visible)

    monkeypatch.setattr(cached_sampling, "next_hidden", another_token)
    finding = examine(precision="bfloat16", temperature=1.0)
    assert finding.level == "refused"
    assert finding.change == (
        "Set precision float32. If float32 does not help, this student is computed differently on the two ways: "
        "report it."
    )


# ── vLLM ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("amount, level", [(0.0, "ok"), (0.019, "ok"), (0.05, "warning"), (0.3, "refused")])
def test_what_vllm_is_off_by_is_what_the_finding_says(examine, off, untied_student, amount, level):
    off(amount)
    finding = examine(engine="vllm", student=str(untied_student), temperature=0.7)
    assert finding.level == level
    assert finding.text.startswith("vLLM against the update, on the CPU: ") and "at temperature 0.7." in finding.text
    mean, largest = map(float, re.search(r"is (\S+) nats in the mean, (\S+) at most", finding.text).groups())
    assert (mean, largest) == pytest.approx((amount, amount), abs=1e-5)


def test_against_vllms_noise_importance_weights_are_named_unless_the_run_has_them(examine, off, untied_student):
    vllm = {"engine": "vllm", "student": str(untied_student)}
    weights = "importance_cap (truncated importance weights)"
    off(0.05)
    assert examine(**vllm).change.startswith(f"Set {weights}, or expect")
    assert examine(**vllm, precision="bfloat16").change.startswith(f"Set precision float32 or {weights}, or expect")
    assert examine(**vllm, importance_cap=2.0).change == "Expect gradients from tokens that another policy drew."
    off(0.3)  # both together
    change = examine(**vllm, precision="bfloat16").change
    assert change.startswith(f"Set precision float32 or {weights}. If float32") and "set engine to own" in change


def test_a_vllm_that_fails_here_is_one_finding_beside_all_others(
    tiny_config, tmp_path, vllm, untied_student, monkeypatch
):
    def breaks(self, *arguments, **options):
        raise RuntimeError("no kernel image\nis available")

    config = tiny_config(tmp_path, engine="vllm", student=str(untied_student), max_new_tokens=12)
    for method in ("generate", "__init__"):
        with monkeypatch.context() as patch:
            patch.setattr(vllm.LLM, method, breaks)
            found = diagnose(config, prompts=4, device="cpu")
        (refusal,) = [f for f in found.findings if f.level == "refused"]
        assert refusal.text == "vLLM failed here, on the CPU: RuntimeError: no kernel image is available"
        assert refusal.change == "Set engine to own."
        assert found.card is not None and [f for f in found.findings if f.subject == "self-distillation"]


def test_a_vllm_that_refuses_the_run_is_the_sentence_of_training(
    tiny_config, tmp_path, vllm, untied_student, monkeypatch
):
    """It is asked for the run's own lengths, not for those that the doctor samples."""

    def short(self, model, *, max_model_len, **options):
        raise ValueError(f"User-specified max_model_len ({max_model_len}) is too long.")

    monkeypatch.setattr(vllm.LLM, "__init__", short)
    prompts = ["12+34+56+78=", *(f"7+{n}=" for n in range(9))]  # the first is trained on alone
    rows = [json.dumps({"prompt": prompt, "answer": "15"}) + "\n" for prompt in prompts]
    (tmp_path / "train.jsonl").write_text("".join(rows))
    config = tiny_config(tmp_path, engine="vllm", student=str(untied_student), max_new_tokens=90, dataset=str(tmp_path))
    (refusal,) = [f for f in diagnose(config, prompts=2, card_tokens=4, device="cpu").findings if f.level == "refused"]
    with pytest.raises(InputError, match=r"max_model_len \(102\) is too long") as error:  # 12 and 90
        train(config, show_progress=False)
    assert refusal.text == str(error.value)


# ── Compiled decoding ────────────────────────────────────────────────────────────────────────────


def test_compiled_decoding_is_named_and_its_own_numbers_are_compared(examine, traced, monkeypatch):
    finding = examine(compile_decoding=True)
    assert finding.level == "ok" and finding.text.startswith("Compiled decoding against the update, on the CPU: ")
    begin = FixedShapeDecoder.begin

    def scaled(self, *arguments):
        read = begin(self, *arguments)
        return lambda *tokens: 1.5 * read(*tokens)

    monkeypatch.setattr(FixedShapeDecoder, "begin", scaled)
    assert examine().level == "ok"
    finding = examine(compile_decoding=True)
    assert finding.level == "refused" and finding.text.startswith("Compiled decoding")
    assert finding.change.endswith("on the two ways: set compile_decoding to false, and report it.")


def test_a_compiler_that_is_missing_is_one_finding(examine, monkeypatch):
    def compiled(read, **options):
        def missing(*arguments):
            raise RuntimeError("No working C++ compiler found")

        return missing

    monkeypatch.setattr(torch, "compile", compiled)
    finding = examine(compile_decoding=True)
    assert (finding.level, finding.change) == ("refused", "Set compile_decoding to false.")
    assert "RuntimeError: No working C++ compiler found" in finding.text


# ── As the run computes ──────────────────────────────────────────────────────────────────────────


def test_adapters_are_those_of_the_run(tiny_config, tmp_path, vllm, untied_student, monkeypatch):
    """vLLM gets the student's weights with the adapters merged; were there none, nothing would be merged."""
    pytest.importorskip("peft", reason="needs the extra lora")
    from peft.tuners.lora import Linear

    true, merged = Linear.get_delta_weight, []

    def delta(self, adapter):
        merged.append(self.r[adapter])
        return true(self, adapter)

    monkeypatch.setattr(Linear, "get_delta_weight", delta)
    config = tiny_config(tmp_path, engine="vllm", student=str(untied_student), lora_rank=3)
    assert diagnose(config, prompts=2, card_tokens=4, device="cpu").status < 2
    assert set(merged) == {3} and len(merged) == 2 * 7  # two layers


def test_memory_that_runs_out_while_sampling_is_a_refusal_with_what_helps(tiny_config, tmp_path, random_pair, vllm,
                                                                          untied_student, monkeypatch):  # fmt: skip
    config = tiny_config(tmp_path, engine="vllm", student=str(untied_student))
    monkeypatch.setattr(vllm.LLM, "generate", lambda *arguments, **options: torch.empty(2**60))
    found = diagnose(config, prompts=2, card_tokens=4, device="cpu")
    assert found.status == 2 and "Lower vllm_memory_share (0.3)" in found.findings[-1].text
    pair = load_pair(random_pair.student, random_pair.teacher)
    monkeypatch.setattr(engine, "sample_responses", lambda *arguments, **options: torch.empty(2**60))
    with pytest.raises(Exception, match=r"Let fewer responses be written at once \(sampling_rows\)"):
        check_sampling(found, tiny_config(tmp_path), pair, ["1+2+4="], ["1+2+4="], 4)
