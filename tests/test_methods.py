"""What each method counts and by what it divides, on a batch small enough to work out by hand."""

import json
import math
from dataclasses import replace

import pytest
import torch

from tgpo_lab.batch import Batch
from tgpo_lab.config import TrainConfig
from tgpo_lab.errors import InputError
from tgpo_lab.methods import TGPO, make_method, method_entries, method_name
from tgpo_lab.rollouts import Rollouts
from tgpo_lab.schedules import Constant
from tgpo_lab.teacher import TeacherAnswers

VOCABULARY = 7


class HandPositions:
    """Stands for Positions: all unmasked positions of the batch in row-major order, logits given."""

    def __init__(self, batch, logits):
        self.batch = batch
        self.row, self.step = batch.rollouts.mask.nonzero(as_tuple=True)
        self.logits = logits[self.row, self.step].unsqueeze(0)
        self.logprobs, self.teacher_token_logprobs = (
            self.logits.log_softmax(-1).gather(-1, self.take(tokens).unsqueeze(-1)).squeeze(-1)
            for tokens in (batch.rollouts.responses, batch.teacher.tokens)
        )
        self.behaviour_logprobs = self.logprobs.detach()
        self.importance_weights = None

    def take(self, values):
        return values[self.row, self.step].unsqueeze(0)


def make_batch(rewards, lengths, traces=(), group_size=2, teacher_tokens=None, teacher_logprobs=None, limit=10):
    """Student rows with these rewards and lengths, then one teacher row for each (reward, length) in ``traces``."""
    lengths = [*lengths, *(length for _, length in traces)]
    width = max(lengths)
    generator = torch.Generator().manual_seed(3)
    responses = torch.randint(1, VOCABULARY, (len(lengths), width), generator=generator)
    mask = torch.tensor([[t < length for t in range(width)] for length in lengths])
    shape = mask.shape
    answers = TeacherAnswers(
        logprobs=torch.full(shape, -1.0) if teacher_logprobs is None else teacher_logprobs,
        tokens=torch.zeros(shape, dtype=torch.long) if teacher_tokens is None else teacher_tokens,
        confidence=torch.full(shape, math.log(0.8)),
    )
    return Batch(
        rollouts=Rollouts([[1]] * len(lengths), responses, mask, torch.ones(len(lengths), dtype=torch.bool), 0),
        from_teacher=torch.arange(len(lengths)) >= len(rewards),
        rewards=torch.tensor([*rewards, *(reward for reward, _ in traces)], dtype=torch.float32),
        teacher=answers,
        behaviour_logprobs=None,
        group_size=group_size,
        max_new_tokens=limit,
        random=torch.Generator().manual_seed(0),
    )


def value(term, batch, logits=None):
    logits = torch.zeros(*batch.rollouts.mask.shape, VOCABULARY) if logits is None else logits
    positions = HandPositions(batch, logits)
    return float(term.loss(positions, positions.take(term.mask)))


def test_grpo_divides_by_all_response_tokens():
    # Group 1: rewards 1, 0 → advantages ±1/√2 with the G − 1 deviation. Group 2: equal rewards → 0.
    batch = make_batch([1, 0, 1, 1], [4, 2, 3, 1])
    (term,) = make_method("grpo").terms(batch, 0)
    advantage = 0.5 / math.sqrt(0.5)
    assert value(term, batch) == pytest.approx(-(4 * advantage - 2 * advantage) / 10, rel=1e-5)


def test_grpo_plus_plus_drops_uniform_groups_and_divides_by_rows_times_limit():
    batch = make_batch([1, 0, 1, 1], [4, 2, 3, 1])
    (term,) = make_method("grpo++").terms(batch, 0)
    assert term.mask.any(-1).tolist() == [True, True, False, False]
    assert value(term, batch) == pytest.approx(-(4 * 0.5 - 2 * 0.5) / (2 * 10), rel=1e-5)


def test_a_batch_of_uniform_groups_gives_no_loss_and_no_division_by_zero():
    batch = make_batch([0, 0], [2, 2])
    for name in ("grpo", "grpo++"):
        (term,) = make_method(name).terms(batch, 0)
        assert value(term, batch) == 0.0


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("kdrl", [True, True, True, True]),
        ("kdrl-wrong-responses", [False, True, True, True]),
        ("kdrl-wrong-groups", [False, False, True, True]),
    ],
)
def test_kdrl_masks_keep_the_normaliser_of_all_tokens(name, rows):
    batch = make_batch([1, 0, 0, 0], [4, 2, 3, 1])
    _, teacher = make_method(name).terms(batch, 0)
    assert teacher.mask.any(-1).tolist() == rows
    counted = sum(length for length, kept in zip([4, 2, 3, 1], rows, strict=True) if kept)
    difference = -math.log(VOCABULARY) + 1.0
    assert value(teacher, batch) == pytest.approx(counted * 0.5 * difference**2 / 10, rel=1e-5)


def test_kdrl_anneals_as_in_the_paper():
    batch = make_batch([1, 0], [2, 2])
    weights = [make_method("kdrl").terms(batch, step)[1].weight for step in (0, 1, 80, 200)]
    assert weights == pytest.approx([5e-3, 4.95e-3, 1e-3, 1e-3])


def test_luffy_puts_the_trace_in_the_place_of_the_last_sample():
    # Group of 3: two own samples with reward 0, the trace with reward 1 → advantages −1/3, −1/3, +2/3.
    batch = make_batch([0, 0, 1], [2, 3, 4], traces=[(1, 5)], group_size=3)
    reward, teacher = make_method("luffy").terms(batch, 0)
    assert reward.mask.any(-1).tolist() == [True, True, False, False]
    assert teacher.mask.any(-1).tolist() == [False, False, False, True]
    probability = 1 / VOCABULARY
    assert value(reward, batch) == pytest.approx((2 + 3) / 3 / 10, rel=1e-5)
    assert value(teacher, batch) == pytest.approx(-5 * 2 / 3 * probability / (probability + 0.1) / 10, rel=1e-5)


def test_sft_learns_from_the_teachers_rows_alone():
    batch = make_batch([0, 0], [2, 3], traces=[(1, 4), (1, 1)])
    (term,) = make_method("sft").terms(batch, 0)
    assert term.mask.any(-1).tolist() == [False, False, True, True]
    assert value(term, batch) == pytest.approx(math.log(VOCABULARY), rel=1e-5)


def test_tgpo_mean_and_sum():
    batch = make_batch([1, 0], [4, 2])
    for guidance_sum, divisor in ((False, 6), (True, 2)):
        _, teacher = make_method("tgpo", guidance_sum=guidance_sum).terms(batch, 0)
        assert value(teacher, batch) == pytest.approx(6 * math.log(VOCABULARY) / divisor, rel=1e-5)


def test_tgpo_weight_follows_the_schedule():
    batch = make_batch([1, 0], [2, 2])
    weights = [make_method("tgpo").terms(batch, step)[1].weight for step in (0, 1, 100, 200, 201)]
    assert weights == pytest.approx([2e-3, 1.99e-3, 1e-3, 0, 0])
    assert make_method("tgpo-constant").terms(batch, 500)[1].weight == 2e-3


def test_guidance_moves_the_teachers_token_and_not_the_sampled_one():
    batch = make_batch([0, 0], [1, 1], teacher_tokens=torch.full((2, 1), 6))
    logits = torch.zeros(2, 1, VOCABULARY, requires_grad=True)
    _, teacher = make_method("tgpo").terms(batch, 0)
    positions = HandPositions(batch, logits)
    teacher.loss(positions, positions.take(teacher.mask)).backward()
    raised = (logits.grad < 0).nonzero()[:, -1].unique().tolist()
    assert raised == [6]
    assert batch.rollouts.responses.flatten().tolist() == [5, 3]


def test_gates_take_tokens_away_and_make_none_heavier():
    logprobs = torch.tensor([[-1.0, -9.0, -1.0, -1.0], [-1.0, -1.0, 0.0, 0.0]])
    batch = make_batch([1, 0], [4, 2], teacher_logprobs=logprobs)
    _, plain = make_method("tgpo").terms(batch, 0)
    _, gated = make_method("tgpo-trust-horizon").terms(batch, 0)
    # The token of −9 nats ends the horizon; the teacher is still asked at its place.
    assert gated.mask.tolist() == [[True, True, False, False], [True, True, False, False]]
    assert value(gated, batch) == pytest.approx(value(plain, batch) * 4 / 6, rel=1e-5)
    assert [float(term.guided) for term in (plain, gated)] == pytest.approx([1, 4 / 6])


def test_a_recovering_horizon_comes_back_when_doubt_has_faded():
    batch = make_batch([1, 0], [5, 2], teacher_logprobs=torch.tensor([[-9.0, -1.0, -1.0, -1.0, -1.0], [0.0] * 5]))
    options = {"gate": "trust_horizon", "doubt": "sum", "doubt_memory": 0.5, "gate_threshold": 4.0}
    _, teacher = make_method("tgpo", **options).terms(batch, 0)  # doubt 0, 9, 5.5, 3.75, 2.875
    assert teacher.mask.tolist() == [[True, False, False, True, True], [True, True, False, False, False]]
    assert value(teacher, batch) == pytest.approx(5 * math.log(VOCABULARY) / 7, rel=1e-5)


@pytest.mark.parametrize("guidance", ["argmax", "sampled", "top_k", "full"])
@pytest.mark.parametrize("guidance_sum", [False, True])
def test_a_soft_horizon_weighs_each_position_and_keeps_the_normaliser(guidance, guidance_sum):
    # Doubt 0, 2, 4 in the first row; 0 and 10,000, of which e^−5,000 is 0, in the second.
    logprobs = torch.tensor([[-2.0, -3.0, -1.0], [-1e4, -1.0, 0.0]])
    batch = make_batch([1, 0], [3, 2], teacher_logprobs=logprobs)
    generator = torch.Generator().manual_seed(5)
    batch.teacher.sampled_tokens = torch.full((2, 3), 4)
    batch.teacher.top_tokens, batch.teacher.top_logprobs = torch.tensor([2, 5]).expand(2, 3, 2), torch.zeros(2, 3, 2)
    student, theirs = (torch.randn(2, 3, VOCABULARY, generator=generator) for _ in range(2))
    options = {"doubt_memory": 0.5, "gate_threshold": 2.0, "guidance": guidance, "guidance_sum": guidance_sum}
    _, teacher = make_method("tgpo-soft-horizon", **options).terms(batch, 0)
    assert teacher.mask.tolist() == [[True, True, True], [True, False, False]]

    positions = HandPositions(batch, student)
    positions.teacher_logits = lambda: positions.take(theirs)
    own, aim = student.log_softmax(-1), torch.zeros(2, 3, VOCABULARY)
    if guidance == "full":
        aim = theirs.softmax(-1)
    else:
        aim[..., {"argmax": [0], "sampled": [4], "top_k": [2, 5]}[guidance]] = 0.5 if guidance == "top_k" else 1.0
    each = -(aim * own).sum(-1) + (aim * aim.clamp(min=1e-30).log()).sum(-1) * (guidance == "full")  # (2, 3)
    weights = {(0, 0): 1.0, (0, 1): math.exp(-1), (0, 2): math.exp(-2), (1, 0): 1.0}
    expected = sum(weight * float(each[place]) for place, weight in weights.items()) / (2 if guidance_sum else 5)
    assert float(teacher.loss(positions, positions.take(teacher.mask))) == pytest.approx(expected, rel=1e-5)
    assert float(teacher.guided) == pytest.approx(sum(weights.values()) / 5, rel=1e-6)


def test_mini_batches_report_their_own_guided_share():
    logprobs = torch.tensor([[-9.0, -1.0, -1.0, -1.0], [-1.0, -1.0, 0.0, 0.0]])
    batch = make_batch([1, 0], [4, 2], teacher_logprobs=logprobs).restricted_to(torch.tensor([0]))
    assert float(make_method("tgpo-trust-horizon").guidance_term(batch, 1.0).guided) == pytest.approx(1 / 4)


def test_the_ablation_guides_no_token_of_the_student_and_reports_no_share():
    batch = make_batch([1, 0], [4, 2], traces=[(1, 3), (1, 3)])
    _, teacher = make_method("tgpo-unconditioned").terms(batch, 0)
    assert teacher.guided is None


@pytest.mark.parametrize(("trace_lengths", "kept"), [([9, 9], 6), ([2, 1], 3)])
def test_the_ablation_uses_as_many_teacher_tokens_as_the_student_wrote(trace_lengths, kept):
    batch = make_batch([1, 0], [4, 2], traces=[(1, length) for length in trace_lengths])
    _, teacher = make_method("tgpo-unconditioned").terms(batch, 0)
    assert int(teacher.mask.sum()) == kept
    assert not teacher.mask[:2].any()
    assert value(teacher, batch) == pytest.approx(kept * math.log(VOCABULARY) / 6, rel=1e-5)


def test_mini_batches_use_advantages_of_whole_groups_and_their_own_normaliser():
    batch = make_batch([1, 0, 0, 1], [4, 2, 3, 1])
    part = batch.restricted_to(torch.tensor([2, 3]))
    (term,) = make_method("grpo").terms(part, 0)
    assert term.mask.any(-1).tolist() == [False, False, True, True]
    advantage = 0.5 / math.sqrt(0.5)
    assert value(term, part) == pytest.approx(-(1 * advantage - 3 * advantage) / 4, rel=1e-5)


def test_every_name_makes_a_method_and_is_found_again():
    for entry in method_entries():
        assert method_name(make_method(entry.name)) == entry.name
        assert method_name(make_method(entry.name, tiny=True)) == entry.name
        assert entry.summary.endswith(".")
    assert make_method("op-distill") == make_method("rkl")


def test_unknown_names_and_options_are_refused():
    with pytest.raises(InputError, match="choose one of grpo"):
        make_method("ppo")
    with pytest.raises(InputError, match="has no option 'wight'"):
        make_method("tgpo", wight=Constant(1.0))
    with pytest.raises(InputError, match="beta"):
        make_method("gkd", beta=1.5)
    with pytest.raises(InputError, match="probability"):
        make_method("tgpo", gate="confidence", gate_threshold=4.0)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("tgpo-trust-horizon", {"gate_threshold": 0.0}, "nats above 0, but is 0.0"),
        ("tgpo-soft-horizon", {"gate_threshold": math.inf}, "nats above 0, but is inf"),
        ("tgpo-soft-horizon", {"gate_threshold": math.nan}, "nats above 0, but is nan"),
        ("tgpo-recovering-horizon", {"doubt_memory": 1.1}, "doubt_memory must be from 0 .* but is 1.1"),
        ("tgpo-recovering-horizon", {"doubt_memory": -0.1}, "doubt_memory must be from 0 .* but is -0.1"),
        ("tgpo-recovering-horizon", {"doubt_memory": math.nan}, "doubt_memory must be from 0 .* but is nan"),
        ("tgpo-recovering-horizon", {"doubt": "mean"}, "doubt must be one of sum, worst_token, but is 'mean'"),
        ("tgpo", {"gate": "trust-horizon"}, "gate must be one of none, .*trust_horizon, but is 'trust-horizon'"),
        ("tgpo", {"guidance": "topk"}, "guidance must be one of argmax, .*top_k, full, but is 'topk'"),
        ("tgpo", {"soft_horizon": True}, "options of the gate trust_horizon, but gate is none"),
        ("tgpo-confidence", {"doubt_memory": 0.5}, "options of the gate trust_horizon, but gate is confidence"),
        ("tgpo-first-departure", {"doubt": "sum"}, "options of the gate trust_horizon, but gate is first_departure"),
    ],
)
def test_a_horizon_that_cannot_work_is_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        make_method(name, **options)


def test_the_horizons_by_name_differ_from_one_another_in_what_their_names_say():
    hard, recovering, soft = (make_method(f"tgpo-{name}-horizon") for name in ("trust", "recovering", "soft"))
    assert hard == TGPO(gate="trust_horizon", gate_threshold=4.0, doubt="worst_token", doubt_memory=1.0)
    assert recovering == TGPO(gate="trust_horizon", gate_threshold=8.0, doubt="sum", doubt_memory=0.9)
    assert soft == replace(recovering, soft_horizon=True)


def test_options_of_the_horizon_survive_json_and_runs_from_before_they_existed_keep_their_meaning():
    options = {"gate_threshold": 1 / 3, "doubt": "worst_token", "doubt_memory": 0.7, "soft_horizon": True}
    config = TrainConfig(method=make_method("tgpo-recovering-horizon", **options))
    assert TrainConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config
    old = TrainConfig(method=make_method("tgpo-trust-horizon")).as_dict()
    for name in ("doubt", "doubt_memory", "soft_horizon"):
        del old["method"][name]
    assert TrainConfig.from_dict(old).method == make_method("tgpo-trust-horizon")
