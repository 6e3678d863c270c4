"""Sampling: right distribution, right tokens, and nothing depends on which rows are still running."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from tgpo_lab.models.pairs import load_pair
from tgpo_lab.sampling import cached_sampling
from tgpo_lab.sampling.cached_sampling import draw_tokens, sample_responses

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


LAST = 1 - 2**-24  # the largest float32 below 1; torch.rand stops there, too
NUMBERS = st.one_of(st.sampled_from([0.0, 1e-30, 0.5, LAST]), st.floats(0, 1, exclude_max=True, width=32))
# Of several blocks and of less than one; −200 leaves nothing in single precision, −20 very little.
SPARSE_LOGITS = st.lists(st.sampled_from([-torch.inf, -200.0, -20.0, 0.0, 1.5]), min_size=1, max_size=300).filter(
    lambda values: max(values) >= -20
)


@settings(max_examples=300)
@given(SPARSE_LOGITS, st.lists(NUMBERS, min_size=1, max_size=4))
def test_a_token_without_probability_is_never_drawn(logits, numbers):
    values = torch.tensor([logits])
    drawn = draw_tokens(values.expand(len(numbers), -1), torch.tensor(numbers))
    assert int(drawn.min()) >= 0 and int(drawn.max()) < len(logits)
    assert (values.softmax(-1)[0, drawn] > 0).all()


@pytest.mark.parametrize("vocabulary", [37, 64, 200, 2048])
@pytest.mark.parametrize("number, place", [(0.0, 0), (0.2689, 0), (0.2690, 1), (LAST, 1)])  # the change: 1/(1+e)
@pytest.mark.parametrize("possible", [(5, 20), (0, 1), (35, 36), (0, 36)])
def test_only_two_tokens_are_possible(vocabulary, possible, number, place):
    # All blocks but the first have no weight, or all but the last; in it, the first tokens have none, or the last.
    for first in (0, vocabulary - 37):
        logits = torch.full((1, vocabulary), -torch.inf)
        logits[0, [first + token for token in possible]] = torch.tensor([0.0, 1.0])
        assert int(draw_tokens(logits, torch.tensor([number]))) == first + possible[place]


@pytest.mark.parametrize("number", [0.0, 0.3, LAST])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("vocabulary", [1, 37, 64, 200])
def test_logits_that_are_not_finite_still_give_a_token(vocabulary, bad, number):
    # So that the step goes on to its loss, which is what tells the user and saves the batch.
    logits = torch.zeros(3, vocabulary)
    logits[0], logits[1, -1] = bad, bad
    drawn = draw_tokens(logits, torch.full((3,), number))
    assert int(drawn.min()) >= 0 and int(drawn.max()) < vocabulary
    assert int(drawn[2]) == int(number * vocabulary)


def test_running_sums_that_are_not_quite_in_order_give_a_possible_token(monkeypatch):
    # As on a GPU, which adds up in parallel: neighbours of no weight between them can differ by a rounding error.
    noise, exact = torch.Generator().manual_seed(0), torch.Tensor.cumsum

    def uneven(values, dim):
        return exact(values, dim) * (1 + 6e-8 * torch.randint(-1, 2, values.shape, generator=noise))

    monkeypatch.setattr(torch.Tensor, "cumsum", uneven)
    logits = torch.full((1, 150), -torch.inf)
    logits[0, [3, 70, 71, 129]] = torch.tensor([0.0, 1.0, -14.0, -16.0])
    numbers = torch.cat([torch.rand(1000, generator=noise), 1 - torch.logspace(-8, -1, 1000)]).clamp(max=LAST)
    drawn = draw_tokens(logits.expand(len(numbers), -1), numbers)
    assert set(drawn.tolist()) <= {3, 70, 71, 129}


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
    monkeypatch.setattr(cached_sampling, "DROP_SHARE", 2.0)  # never
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
