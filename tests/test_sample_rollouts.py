"""Annotated rollouts: every number against the models' own logits, every token made visible."""

import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tgpo_lab.errors import InputError
from tgpo_lab.explorer.token_text import visible_text
from tgpo_lab.models.pairs import load_pair
from tgpo_lab.reports.sample_rollouts import AnnotatedToken, annotate

PROMPTS, ANSWERS = ["1+2+4=", "0+0+7=", "3+3+1=", "5+1+1="], ["7", "7", "7", "8"]
LIMIT = 12


@pytest.fixture(scope="module")
def pair(random_pair):
    return load_pair(random_pair.student, random_pair.teacher)


def annotated(pair, **changes):
    options = {"max_new_tokens": LIMIT, "temperature": 1.0, "seed": 3}
    return annotate(pair, pair.student, PROMPTS, ANSWERS, **{**options, **changes})


def written_tokens(pair, rollout) -> list[int]:
    """Ids of a response, found again by the texts that were made visible."""
    known = {visible_text(pair.tokenizer, token): token for token in range(pair.vocabulary_size)}
    return [known[token.text] for token in rollout.tokens]


@pytest.mark.parametrize(("temperature", "divisor"), [(0.0, 1.0), (1.0, 1.0), (0.8, 0.8)])
def test_numbers_are_those_of_the_models_own_logits(pair, temperature, divisor):
    """The shift is written out here: logits at p − 1 judge the token at p, one row at a time, without padding."""
    rollouts = annotated(pair, temperature=temperature)
    if temperature:
        assert len({len(rollout.tokens) for rollout in rollouts}) > 1, "padding is not tested"
    some_differ = some_agree = False
    for rollout in rollouts:
        prompt, response = pair.tokenizer(rollout.prompt)["input_ids"], written_tokens(pair, rollout)
        with torch.no_grad():
            student, teacher = (
                model(torch.tensor([prompt + response])).logits[0].double() for model in (pair.student, pair.teacher)
            )
        for place, (token, found) in enumerate(zip(response, rollout.tokens, strict=True)):
            own = (student[len(prompt) + place - 1] / divisor).log_softmax(-1)
            theirs = teacher[len(prompt) + place - 1].log_softmax(-1)
            assert found.student_logprob == pytest.approx(own[token].item(), abs=1e-4)
            assert found.teacher_logprob == pytest.approx(theirs[token].item(), abs=1e-4)
            assert found.difference == pytest.approx((own[token] - theirs[token]).item(), abs=2e-4)
            best = int(theirs.argmax())
            assert found.proposal == visible_text(pair.tokenizer, best)
            assert found.differs == (best != token)
            some_differ, some_agree = some_differ or found.differs, some_agree or not found.differs
            if temperature == 0:
                assert token == int(own.argmax())
    assert some_agree and (some_differ or not temperature)


def test_micro_batches_change_nothing_but_rounding(pair):
    for one, many in zip(annotated(pair, micro_batch_tokens=1), annotated(pair), strict=True):
        assert [t.text for t in one.tokens] == [t.text for t in many.tokens]
        for a, b in zip(one.tokens, many.tokens, strict=True):
            assert (a.proposal, a.differs) == (b.proposal, b.differs)
            assert a.student_logprob == pytest.approx(b.student_logprob, abs=1e-4)
            assert a.teacher_logprob == pytest.approx(b.teacher_logprob, abs=1e-4)


def test_the_seed_decides_the_samples(pair):
    assert annotated(pair) == annotated(pair)
    assert annotated(pair) != annotated(pair, seed=4)
    greedy = annotated(pair, temperature=0.0)
    assert greedy == annotated(pair, temperature=0.0, seed=4)


def test_rewards_prompts_and_ends_are_those_of_the_responses(pair):
    rollouts = [rollout for seed in range(8) for rollout in annotated(pair, seed=seed)]
    for number, rollout in enumerate(rollouts):
        assert (rollout.prompt, rollout.answer) == (PROMPTS[number % 4], ANSWERS[number % 4])
        assert 1 <= len(rollout.tokens) <= LIMIT
        texts = [token.text for token in rollout.tokens]
        assert rollout.finished == (texts[-1] == "<eos>")
        assert "<eos>" not in texts[:-1]
        right = texts[-3:] == ["#", rollout.answer, "<eos>"]
        assert rollout.reward == float(right)
        assert rollout.temperature == 1.0
    assert 0 < sum(rollout.reward for rollout in rollouts) < len(rollouts)
    assert any(not rollout.finished for rollout in rollouts)


def test_another_model_is_annotated_against_the_same_teacher(pair):
    """The teacher as the student: it agrees with itself."""
    for rollout in annotate(pair, pair.teacher, PROMPTS, ANSWERS, max_new_tokens=LIMIT):
        for token in rollout.tokens:
            assert token.difference == pytest.approx(0, abs=1e-4)
            assert not token.differs and token.proposal == token.text


def test_annotating_leaves_no_gradient(pair):
    annotated(pair)
    assert all(parameter.grad is None for parameter in pair.student.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": [], "answers": []}, "at least one prompt, but got 0 prompts"),
        ({"answers": ["7"]}, "4 prompts and 1 answers"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"reward": "kindness"}, "Unknown reward 'kindness'"),
    ],
)
def test_what_cannot_be_annotated_is_refused(pair, changes, message):
    options = {"prompts": PROMPTS, "answers": ANSWERS, "max_new_tokens": 4, **changes}
    with pytest.raises(InputError, match=message):
        annotate(pair, pair.student, **options)


def test_a_difference_may_be_infinite():
    assert AnnotatedToken("a", -1.0, -math.inf, "b", True).difference == math.inf


def test_spaces_and_new_lines_of_the_projects_tokenizer_are_visible(tokenizer):
    ids = tokenizer.convert_tokens_to_ids([" ", "\n", " carry", "7", "</think>", "<eos>"])
    assert [visible_text(tokenizer, token) for token in ids] == ["␣", "↵", "␣carry", "7", "</think>", "<eos>"]


def byte_level() -> PreTrainedTokenizerFast:
    vocabulary = {"a": 0, "Ġthe": 1, "Ċ": 2, "Ã": 3, "<script>": 4, "âĢ®": 5, "ĉ": 6, "Ã¶": 7}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (1, "␣the"),
        (2, "↵"),
        (3, "Ã"),  # the first byte of ö: no character of its own, so shown as in the vocabulary
        (4, "<script>"),  # escaping is the report's business
        (5, "\\u202e"),  # it would turn the direction of the text around
        (6, "⇥"),
        (7, "ö"),
    ],
)
def test_byte_level_tokens_are_readable(token, expected):
    assert visible_text(byte_level(), token) == expected


def test_a_sentencepiece_token_keeps_its_space():
    backend = Tokenizer(models.WordLevel({"▁the": 0, "the": 1}, unk_token="the"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert [visible_text(tokenizer, token) for token in (0, 1)] == ["␣the", "the"]
