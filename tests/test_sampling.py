"""Sampling: right distribution, right tokens, and nothing depends on which rows are still running."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from tgpo_lab import sampling
from tgpo_lab.pairs import load_pair
from tgpo_lab.sampling import draw_tokens, sample_responses

PROMPTS = ["47+85+36=", "7+8=", "12+34+56+78="]


@pytest.fixture(scope="module")
def pair(random_pair):
    return load_pair(random_pair.student, random_pair.teacher)


def sample(pair, texts=PROMPTS, tokens=10, **options):
    options = {"temperature": 1.0, "generator": torch.Generator().manual_seed(5), "end_tokens": [1], **options}
    end_tokens = options.pop("end_tokens")
    return sample_responses(pair.student, pair.encode(texts), tokens, end_tokens, 0, **options)


def test_drawn_tokens_follow_the_distribution():
    logits = torch.tensor([2.0, -1.0, 0.5, 0.0, -30.0, 1.0, 1.0, -0.3, 0.2, 0.9, -2.0])
    draws = 200_000
    drawn = draw_tokens(logits.expand(draws, -1), torch.rand(draws, generator=torch.Generator().manual_seed(0)))
    observed = torch.bincount(drawn, minlength=len(logits)).double()
    expected = logits.double().softmax(-1) * draws
    likely = expected > 5  # the chi-square check needs counts; the token at e^-30 must not appear at all
    assert observed[~likely].sum() == 0
    scale = observed[likely].sum() / expected[likely].sum()
    assert chisquare(observed[likely].numpy(), (expected[likely] * scale).numpy()).pvalue > 1e-3


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=70),
    st.floats(0, 1, exclude_max=True, width=32),
)
def test_drawn_token_is_where_the_cumulative_distribution_passes_the_number(logits, number):
    values = torch.tensor([logits])
    token = int(draw_tokens(values, torch.tensor([number])))
    probabilities = values[0].double().softmax(-1)
    before = float(probabilities[:token].sum())
    assert 0 <= token < len(logits)
    assert before - 1e-5 <= number <= before + float(probabilities[token]) + 1e-5


@pytest.mark.parametrize("number", [0.0, 0.99999994])
def test_tokens_without_probability_are_never_drawn_at_the_ends(number):
    logits = torch.full((1, 37), -torch.inf)
    logits[0, [5, 20]] = 0.0
    assert int(draw_tokens(logits, torch.tensor([number]))) in (5, 20)


def test_greedy_sampling_equals_generate_of_transformers_with_prompts_of_different_length(pair):
    ours = sample(pair, temperature=0.0, generator=None)
    for row, text in enumerate(PROMPTS):
        tokens = torch.tensor(pair.encode([text]))
        theirs = pair.student.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=10, do_sample=False, eos_token_id=1,
            pad_token_id=0,
        )[0, tokens.shape[1] :]  # fmt: skip
        assert ours.responses[row, : ours.lengths[row]].tolist() == theirs.tolist()


def test_what_a_row_samples_does_not_depend_on_dropping_finished_rows(pair, monkeypatch):
    # With a quarter of the vocabulary as ends, rows finish all the time.
    ends = list(range(0, 2048, 4))
    options = {"tokens": 24, "end_tokens": ends, "samples_per_prompt": 16}
    dropped_at_once = sample(pair, **options)
    assert len(set(dropped_at_once.lengths.tolist())) > 3
    monkeypatch.setattr(sampling, "DROP_SHARE", 2.0)  # never
    never_dropped = sample(pair, **options)
    assert torch.equal(dropped_at_once.responses, never_dropped.responses)
    assert torch.equal(dropped_at_once.mask, never_dropped.mask)


def test_masks_end_with_the_end_token_and_padding_comes_after(pair):
    ends = list(range(0, 2048, 4))
    rollouts = sample(pair, tokens=8, end_tokens=ends, samples_per_prompt=16)
    for row in range(len(rollouts)):
        length = int(rollouts.lengths[row])
        tokens = rollouts.responses[row].tolist()
        assert all(t % 4 for t in tokens[: length - 1])
        assert bool(rollouts.finished[row]) == (tokens[length - 1] % 4 == 0)
        assert bool(rollouts.finished[row]) or length == 8
        assert rollouts.mask[row].tolist() == [t < length for t in range(len(tokens))]
        assert tokens[length:] == [0] * (len(tokens) - length)


def test_mask_is_right_when_the_padding_token_is_also_an_ordinary_token(pair):
    """A mask made by comparing with the padding id would lose these tokens."""
    rollouts = sample(pair, tokens=12, end_tokens=[2047], samples_per_prompt=64)
    written = rollouts.responses[rollouts.mask]
    assert (written == 0).any(), "no sampled token has the padding id: take another seed"
    assert int(rollouts.lengths.sum()) == len(written)


def test_groups_stand_together_and_samples_of_a_group_differ(pair):
    rollouts = sample(pair, samples_per_prompt=4)
    assert rollouts.prompts == [p for p in pair.encode(PROMPTS) for _ in range(4)]
    assert len({tuple(row) for row in rollouts.responses[:4].tolist()}) == 4


def test_the_same_seed_gives_the_same_samples_and_another_seed_others(pair):
    first, again = sample(pair), sample(pair)
    other = sample(pair, generator=torch.Generator().manual_seed(6))
    assert torch.equal(first.responses, again.responses)
    assert not torch.equal(first.responses, other.responses)


def test_ids_beyond_the_shared_vocabulary_are_never_written(pair):
    rollouts = sample(pair, samples_per_prompt=32, vocabulary_size=50)
    assert int(rollouts.responses.max()) < 50
    assert int(sample(pair, samples_per_prompt=32).responses.max()) >= 50


def test_low_temperature_approaches_greedy(pair):
    cold = sample(pair, temperature=1e-4)
    assert torch.equal(cold.responses, sample(pair, temperature=0.0, generator=None).responses)


def test_sampling_without_a_generator_is_refused(pair):
    with pytest.raises(ValueError, match="generator"):
        sample(pair, generator=None)
