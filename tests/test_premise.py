"""The premise of guidance measured, against transformers' own generation, one prefix at a time."""

import pytest
import torch

from tgpo_lab.diagnostics.premise import continue_from, premise_by_depth
from tgpo_lab.errors import InputError
from tgpo_lab.evaluation import evaluate, pair_prompts
from tgpo_lab.models.pairs import load_pair

COUNT = 12


@pytest.fixture(scope="module")
def pair():
    return load_pair("near")


@pytest.fixture(scope="module")
def prompts(pair):
    return pair_prompts(pair, "test").select(range(COUNT))


@pytest.fixture(scope="module")
def sampled(pair, prompts):
    return evaluate(pair, prompts=prompts, temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def frame(pair, prompts, sampled):
    return premise_by_depth(pair, sampled, prompts, depths=(0, 1, 4, 16, 64))


def generated(pair, model, start, answer):
    """Greedy by transformers, judged by hand: 1.0 for a response that ends with the right answer after its last #."""
    tokens = torch.tensor([start])
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=80, do_sample=False, pad_token_id=0
    )
    tokens = out[0].tolist()
    if tokens[-1] not in pair.end_tokens:
        return 0.0
    return float(pair.tokenizer.decode(tokens[:-1]).rpartition("#")[2].strip() == answer)


def test_without_a_prefix_it_is_plain_accuracy(pair, prompts, frame):
    start = frame[frame["depth"] == 0]
    assert start["teacher_right"].mean() == pytest.approx(evaluate(pair, pair.teacher, prompts=prompts).accuracy)
    assert start["student_right"].mean() == pytest.approx(evaluate(pair, prompts=prompts).accuracy)
    assert (start["prefix_surprise"] == 0).all() and len(start) == COUNT


@pytest.mark.parametrize("depth", [1, 4, 16])
def test_continuations_are_those_of_the_models_themselves(pair, prompts, sampled, frame, depth):
    rows = frame[frame["depth"] == depth].set_index("row")
    assert list(rows.index) == [row for row, length in enumerate(sampled.rollouts.lengths.tolist()) if length > depth]
    for row, found in rows.iterrows():
        prefix = sampled.rollouts.prompts[row] + sampled.rollouts.responses[row, :depth].tolist()
        answer = prompts[row]["answer"]
        with torch.no_grad():
            logprobs = pair.teacher(torch.tensor([prefix])).logits[0].log_softmax(-1)
        proposed = int(logprobs[-1].argmax())
        assert found["teacher_right"] == generated(pair, pair.teacher, prefix, answer)
        assert found["student_right"] == generated(pair, pair.student, prefix, answer)
        if proposed not in pair.end_tokens:
            expected = generated(pair, pair.student, [*prefix, proposed], answer)
            assert found["student_right_after_token"] == expected
        assert found["teacher_confidence"] == pytest.approx(float(logprobs[-1].max().exp()), abs=1e-4)
        entropy = float(-(logprobs[-1].exp() * logprobs[-1]).sum())
        assert found["teacher_entropy"] == pytest.approx(entropy, abs=1e-3)
        first = len(prefix) - depth
        written = [float(logprobs[t - 1, prefix[t]]) for t in range(first, len(prefix))]
        assert found["prefix_surprise"] == pytest.approx(-min(written), abs=1e-3)


def test_deeper_prefixes_are_only_those_of_longer_responses(sampled, frame):
    counts = frame.groupby("depth").size()
    for depth, count in counts.items():
        assert count == int((sampled.rollouts.lengths > depth).sum())
    assert 64 not in counts  # no response is so long


def test_responses_too_short_for_any_prefix_are_refused(pair, prompts):
    cut = evaluate(pair, prompts=prompts, temperature=1.0, max_new_tokens=1)
    with pytest.raises(InputError, match="longer than 1 tokens"):
        premise_by_depth(pair, cut, prompts)


def test_a_prefix_that_has_ended_is_judged_as_it_is(pair):
    end = pair.end_tokens[0]
    encode = pair.tokenizer.encode
    options = {"max_new_tokens": 80, "reward": "marked_answer"}
    prefixes = [[*encode(" the sum is #12"), end], [*encode(" the sum is #13"), end], encode("<think>")]
    prompts = pair.encode(["10+10+10="] * 3)
    found = continue_from(pair, pair.teacher, prompts, prefixes, ["12", "12", "30"], **options)
    assert found == [1.0, 0.0, 1.0]
    assert continue_from(pair, pair.teacher, prompts[:1], prefixes[:1], ["12"], **options) == [1.0]
