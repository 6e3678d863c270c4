"""Where the teacher is asked: gates and horizons against numbers worked by hand and definitions token by token."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tgpo_lab.guidance import (
    apply_gate,
    confidence_gate,
    first_departure_gate,
    teacher_doubt,
    trust_horizon_gate,
    trust_horizon_weights,
)
from tgpo_lab.teacher import TeacherAnswers

either_doubt = pytest.mark.parametrize("doubt", ["sum", "worst_token"])
surprises = st.lists(st.floats(0, 40) | st.sampled_from([0.0, 4.0, 8.0]), min_size=1, max_size=20)
memories = st.floats(0, 1) | st.sampled_from([0.0, 0.5, 0.9, 1.0])
thresholds = st.floats(0.1, 50)


def logprobs_of(*rows: list[float]) -> torch.Tensor:
    """(B, T) log-probabilities with these surprises."""
    return -torch.tensor(rows, dtype=torch.float64)


def by_definition(row: list[float], doubt: str, memory: float) -> list[float]:
    """D_t from all tokens before t, each faded by its own distance."""
    before = [[memory ** (t - 1 - i) * row[i] for i in range(t)] for t in range(len(row))]
    return [math.fsum(faded) if doubt == "sum" else max(faded, default=0.0) for faded in before]


@either_doubt
@given(row=surprises, memory=memories)
def test_doubt_is_what_its_definition_says(doubt, row, memory):
    (found,) = teacher_doubt(logprobs_of(row), doubt, memory).tolist()
    assert found == pytest.approx(by_definition(row, doubt, memory), rel=1e-12, abs=1e-12)


@either_doubt
@pytest.mark.parametrize("memory", [0.0, 0.3, 0.9, 0.999, 1.0])
def test_doubt_over_8192_tokens_in_single_precision_follows_the_recurrence(doubt, memory):
    surprise = torch.rand(2, 8192, generator=torch.Generator().manual_seed(0)) ** 8 * 20
    found = teacher_doubt(-surprise, doubt, memory)
    assert found.dtype == torch.float32
    for row, doubts in zip(surprise.tolist(), found.tolist(), strict=True):
        expected = [0.0]
        for s in row[:-1]:
            faded = memory * expected[-1]
            expected.append(faded + s if doubt == "sum" else max(faded, s))
        assert doubts == pytest.approx(expected, rel=2e-6, abs=1e-6)


def test_doubt_by_hand():
    logprobs = logprobs_of([1, 4, 2, 0.5], [0, 8, 0, 0])
    assert teacher_doubt(logprobs, "sum", 0.5).tolist() == [[0, 1, 4.5, 4.25], [0, 0, 8, 4]]
    assert teacher_doubt(logprobs, "worst_token", 0.5).tolist() == [[0, 1, 4, 2], [0, 0, 8, 4]]
    assert teacher_doubt(logprobs, "worst_token", 1.0).tolist() == [[0, 1, 4, 4], [0, 0, 8, 8]]


@given(st.lists(st.lists(st.floats(-5, 5), min_size=4, max_size=4), min_size=2, max_size=12), st.integers(0, 3))
def test_doubt_that_never_fades_is_the_teachers_surprise_at_the_whole_prefix(logits, stride):
    tokens = [(t * stride) % 4 for t in range(len(logits))]
    exponentials = [[math.exp(x) for x in row] for row in logits]
    each = [row[token] / sum(row) for row, token in zip(exponentials, tokens, strict=True)]
    logprobs = torch.tensor(logits, dtype=torch.float64).log_softmax(-1)[range(len(tokens)), tokens]
    (found,) = teacher_doubt(logprobs.unsqueeze(0), "sum", 1.0).tolist()
    assert found == pytest.approx([-math.log(math.prod(each[:t])) for t in range(len(tokens))], abs=1e-9)
    believed = trust_horizon_weights(torch.tensor(found, dtype=torch.float64), 3.0).tolist()
    assert believed == pytest.approx([math.prod(each[:t]) ** (1 / 3) for t in range(len(tokens))], rel=1e-9)


@either_doubt
@given(row=surprises)
def test_doubt_without_memory_is_the_surprise_at_the_last_token(doubt, row):
    assert teacher_doubt(logprobs_of(row), doubt, 0.0).tolist() == [[0.0, *row[:-1]]]


@either_doubt
def test_a_departure_fades_with_the_half_life_of_its_memory(doubt):
    (found,) = teacher_doubt(logprobs_of([16.0] + [0.0] * 20), doubt, 0.5 ** (1 / 5)).tolist()
    assert [found[t] for t in (1, 6, 11, 16)] == pytest.approx([16, 8, 4, 2])


@given(row=surprises, memory=memories, more=memories)
def test_doubt_grows_with_memory_and_the_sum_is_at_least_the_worst_token(row, memory, more):
    memory, more = sorted((memory, more))
    logprobs = logprobs_of(row)
    less, worst = teacher_doubt(logprobs, "sum", memory), teacher_doubt(logprobs, "worst_token", memory)
    assert (worst <= less + 1e-9).all()
    assert (less <= teacher_doubt(logprobs, "sum", more) + 1e-9).all()
    assert (worst <= teacher_doubt(logprobs, "worst_token", more) + 1e-9).all()


@given(row=surprises, threshold=thresholds)
def test_the_horizon_of_the_worst_token_ends_for_good_after_the_first_token_above_the_threshold(row, threshold):
    ended, expected = False, []
    for s in row:
        expected.append(not ended)
        ended = ended or s > threshold
    assert trust_horizon_gate(teacher_doubt(logprobs_of(row), "worst_token", 1.0), threshold).tolist() == [expected]


def test_a_horizon_ends_after_the_departure_comes_back_if_doubt_fades_and_stays_shut_if_not():
    logprobs = logprobs_of([0, 10, 0, 0, 0, 0], [5, 5, 5, 0, 0, 0])
    faded = trust_horizon_gate(teacher_doubt(logprobs, "sum", 0.8), 8.0).tolist()
    assert faded == [[True, True, False, True, True, True], [True, True, False, False, False, True]]
    kept = trust_horizon_gate(teacher_doubt(logprobs, "sum", 1.0), 8.0).tolist()
    assert kept == [[True, True, False, False, False, False], [True, True, False, False, False, False]]


def test_ordinary_entropy_ends_a_horizon_whose_doubt_adds_up_for_ever():
    long = logprobs_of([0.3] * 200)
    assert trust_horizon_gate(teacher_doubt(long, "sum", 1.0), 8.0).sum() == 27  # 26·0.3 ≤ 8 < 27·0.3
    for doubt, memory in (("sum", 0.9), ("worst_token", 1.0)):
        assert trust_horizon_gate(teacher_doubt(long, doubt, memory), 8.0).all()
    assert teacher_doubt(long, "sum", 0.9)[0, -1].item() == pytest.approx(0.3 / (1 - 0.9))


@either_doubt
@given(row=surprises, memory=memories, threshold=thresholds, more=thresholds)
def test_a_higher_threshold_trusts_every_position_at_least_as_much(doubt, row, memory, threshold, more):
    threshold, more = sorted((threshold, more))
    doubts = teacher_doubt(logprobs_of(row), doubt, memory)
    assert (trust_horizon_gate(doubts, threshold) <= trust_horizon_gate(doubts, more)).all()
    assert (trust_horizon_weights(doubts, threshold) <= trust_horizon_weights(doubts, more)).all()


@either_doubt
@given(row=surprises, memory=memories, threshold=thresholds)
def test_soft_weights_start_at_1_stay_within_0_and_1_and_are_1_over_e_at_the_hard_edge(doubt, row, memory, threshold):
    doubts = teacher_doubt(logprobs_of(row), doubt, memory)
    weights = trust_horizon_weights(doubts, threshold)
    assert weights[0, 0] == 1 and ((weights >= 0) & (weights <= 1)).all()
    hard, clear = trust_horizon_gate(doubts, threshold), (doubts - threshold).abs() > 1e-9
    assert torch.equal(hard[clear], (weights > math.exp(-1))[clear])


@given(st.lists(st.sampled_from([0.0, 1e5]), min_size=1, max_size=20))
def test_soft_and_hard_are_the_same_where_the_teacher_is_either_certain_or_lost(row):
    doubts = teacher_doubt(logprobs_of(row), "sum", 1.0)
    assert torch.equal(trust_horizon_weights(doubts, 4.0), trust_horizon_gate(doubts, 4.0).double())


def test_soft_weights_by_hand():
    doubts = teacher_doubt(logprobs_of([2, 3, 0, 0]), "sum", 0.5)  # 0, 2, 4, 2
    assert trust_horizon_weights(doubts, 2.0).tolist() == [pytest.approx([1, math.exp(-1), math.exp(-2), math.exp(-1)])]


@either_doubt
@pytest.mark.parametrize("memory", [0.0, 0.5, 1.0])
def test_a_token_that_the_teacher_rules_out_shuts_the_horizon_and_gives_no_nan(doubt, memory):
    doubts = teacher_doubt(torch.tensor([[0.0, -math.inf, *[-1.0] * 60]]), doubt, memory)
    assert torch.isfinite(doubts).all()
    hard, soft = trust_horizon_gate(doubts, 8.0)[0], trust_horizon_weights(doubts, 8.0)[0]
    assert (hard[:4].tolist(), soft[2].item()) == ([True, True, False, memory == 0], 0.0)
    assert bool(hard[-1]) == (memory < 1)


def test_a_log_probability_that_rounding_lifts_above_0_is_no_negative_surprise():
    doubts = teacher_doubt(torch.tensor([[1e-7, 1e-7, 0.0]]), "sum", 1.0)
    assert doubts.tolist() == [[0, 0, 0]]
    assert trust_horizon_weights(doubts, 1e-9).max() == 1


def test_first_departure_by_hand():
    written, teachers = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[3, 9, 5, 6]])
    assert first_departure_gate(written, teachers).tolist() == [[True, True, False, False]]
    assert first_departure_gate(written, written).all()


def test_confidence_gate_by_hand():
    assert confidence_gate(torch.tensor([[0.95, 0.85]]).log(), 0.9).tolist() == [[True, False]]


GATES = {
    "none": {},
    "confidence": {"threshold": 0.5},
    "first_departure": {},
    "trust_horizon": {},
    "recovering": {"gate": "trust_horizon", "doubt": "sum", "memory": 0.7},
    "soft": {"gate": "trust_horizon", "doubt": "sum", "memory": 0.9, "soft": True},
}
each_gate = pytest.mark.parametrize("name", GATES)


def weights_of(name: str, tokens: torch.Tensor, answers: TeacherAnswers) -> torch.Tensor:
    return apply_gate(**{"gate": name, "threshold": 4.0, **GATES[name]}, tokens=tokens, answers=answers)


def rollouts_of(length: int, seed: int) -> tuple[torch.Tensor, TeacherAnswers]:
    """Three rows whose student mostly writes the teacher's token, and sometimes one of up to 12 nats."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, (3, length), generator=g)
    other = torch.rand(3, length, generator=g) < 0.2
    logprobs = -torch.rand(3, length, generator=g) * torch.where(other, 12.0, 0.5)
    return tokens, TeacherAnswers(logprobs, (tokens + other) % 5, torch.rand(3, length, generator=g).log())


@each_gate
@given(length=st.integers(2, 40), seed=st.integers(0, 2**31), data=st.data())
def test_a_weight_never_depends_on_what_comes_later(name, length, seed, data):
    t = data.draw(st.integers(0, length - 1))
    tokens, answers = rollouts_of(length, seed)
    before = weights_of(name, tokens, answers)[:, : t + 1]
    # The token at t and everything after it are written anew; what the teacher says at t stays as it is.
    later_tokens, later = rollouts_of(length, seed + 1)
    tokens[:, t:], answers.logprobs[:, t:] = later_tokens[:, t:], later.logprobs[:, t:]
    answers.tokens[:, t + 1 :], answers.confidence[:, t + 1 :] = later.tokens[:, t + 1 :], later.confidence[:, t + 1 :]
    assert torch.equal(weights_of(name, tokens, answers)[:, : t + 1], before)
    cut = TeacherAnswers(*(x[:, : t + 1] for x in (answers.logprobs, answers.tokens, answers.confidence)))
    assert torch.equal(weights_of(name, tokens[:, : t + 1], cut), before)


@each_gate
def test_every_gate_gives_weights_from_0_to_1_that_are_0_or_1_where_it_is_hard(name):
    weights = weights_of(name, *rollouts_of(40, 0))
    assert weights.dtype == torch.float32 and weights.shape == (3, 40)
    assert ((weights >= 0) & (weights <= 1)).all()
    between = (weights > 0) & (weights < 1)
    assert bool(between.any()) == (name == "soft")
    assert bool((weights == 0).any()) == (name not in ("none", "soft"))


def test_a_horizon_that_recovers_opens_again_and_one_that_does_not_never_does():
    def opened_again(name):
        rows = weights_of(name, *rollouts_of(40, 0)).tolist()
        return any(now > before for row in rows for before, now in pairwise(row))

    assert [opened_again(name) for name in ("first_departure", "trust_horizon")] == [False, False]
    assert [opened_again(name) for name in ("recovering", "soft")] == [True, True]
