"""Every number of the guidance explorer: against formulas, the methods that train, and plain forward passes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tgpo_lab.batch import Batch, Positions
from tgpo_lab.errors import InputError
from tgpo_lab.explorer.guidance_view import advantages_by_prompt, view_guidance
from tgpo_lab.explorer.logit_updates import UPDATE_METHODS, logit_updates
from tgpo_lab.explorer.token_text import visible_text
from tgpo_lab.methods import make_method
from tgpo_lab.models.pairs import load_pair
from tgpo_lab.rollouts import Rollouts
from tgpo_lab.sampling.cached_sampling import sample_responses
from tgpo_lab.tasks.rewards import marked_answer, score
from tgpo_lab.teacher import ask_teacher

PROMPTS, GROUP = ["1+2+4=", "0+0+7="], 4


@pytest.fixture(scope="module")
def pair(random_pair):
    return load_pair(random_pair.student, random_pair.teacher)


@pytest.fixture(scope="module")
def rollouts(pair):
    sampled = sample_responses(
        pair.student,
        pair.encode(PROMPTS),
        12,
        pair.end_tokens,
        pair.pad_token,
        samples_per_prompt=GROUP,
        generator=torch.Generator().manual_seed(5),
        vocabulary_size=pair.vocabulary_size,
    )
    assert len(set(sampled.lengths.tolist())) > 2, "padding is not tested"
    return sampled


@pytest.fixture(scope="module")
def advantages(pair, rollouts):
    found = advantages_by_prompt(rollouts, score(rollouts, ["7"] * len(rollouts), marked_answer, pair.tokenizer))
    assert found.abs().max() > 0, "no reward differs within a group"
    return found


def reference_updates(student, teacher, token, advantage, guidance):
    """The formulas at the head of logit_updates.py, one token of the vocabulary after the other."""
    p = [math.exp(x) / sum(math.exp(y) for y in student) for x in student]
    q = [math.exp(x) / sum(math.exp(y) for y in teacher) for x in teacher]
    best = max(range(len(q)), key=lambda v: q[v])
    divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    reward = math.log(q[token] / p[token])
    moved = {name: [] for name in UPDATE_METHODS}
    for v in range(len(p)):
        written, proposed = (v == token) - p[v], (v == best) - p[v]
        moved["rkl"].append(reward * written)
        moved["exact-rkl"].append(-p[v] * (math.log(p[v] / q[v]) - divergence))
        moved["grpo"].append(advantage * written)
        moved["tgpo"].append(advantage * written + guidance * proposed)
    return moved


@given(st.integers(0, 10**6), st.integers(2, 6), st.floats(-3, 3), st.floats(0, 1))
def test_updates_are_those_of_the_formulas(seed, vocabulary, advantage, guidance):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(3, vocabulary, generator=generator, dtype=torch.float64) for _ in range(2))
    tokens = torch.randint(vocabulary, (3,), generator=generator)
    wide = torch.ones(3, dtype=torch.float64)
    found = logit_updates(student, teacher, tokens, advantage * wide, guidance * wide)
    for row in range(3):
        expected = reference_updates(
            student[row].tolist(), teacher[row].tolist(), int(tokens[row]), advantage, guidance
        )
        for name in UPDATE_METHODS:
            assert found[name][row].tolist() == pytest.approx(expected[name], abs=1e-9), name


def test_updates_worked_by_hand():
    """Student (½, ¼, ¼), teacher (¼, ½, ¼); token 0 was written with A = 1, w·g = 0.1; log ρ = ln 2."""
    student = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64).log()
    one = torch.ones(1, dtype=torch.float64)
    found = logit_updates(student, teacher, torch.tensor([0]), one, 0.1 * one)
    ln2 = math.log(2)
    assert found["rkl"][0].tolist() == pytest.approx([-ln2 / 2, ln2 / 4, ln2 / 4])
    # KL = ½·ln 2 − ¼·ln 2 = ¼·ln 2
    assert found["exact-rkl"][0].tolist() == pytest.approx([-3 * ln2 / 8, 5 * ln2 / 16, ln2 / 16])
    assert found["grpo"][0].tolist() == pytest.approx([0.5, -0.25, -0.25])
    assert found["tgpo"][0].tolist() == pytest.approx([0.45, -0.175, -0.275])


@pytest.mark.parametrize("name", UPDATE_METHODS)
@pytest.mark.parametrize("gate", ["none", "trust_horizon"])
def test_updates_are_the_gradients_of_the_methods_that_train(pair, rollouts, advantages, name, gate):
    """The method's own terms over the whole batch, differentiated at the logits, times the tokens they divide by."""
    tgpo = make_method("tgpo", tiny=True, gate=gate)
    method = tgpo if name == "tgpo" else make_method(name, tiny=True)
    asked = ask_teacher(
        pair.teacher,
        rollouts,
        vocabulary_size=pair.vocabulary_size,
        micro_batch_tokens=4096,
        keep_distribution=rollouts.mask,
    )
    batch = Batch(
        rollouts,
        torch.zeros(len(rollouts), dtype=torch.bool),
        score(rollouts, ["7"] * len(rollouts), marked_answer, pair.tokenizer),
        asked,
        None,
        GROUP,
        12,
        torch.Generator(),
    )
    view = view_guidance(pair, rollouts, advantages=advantages, method=tgpo, top_k=5)
    for row in range(len(rollouts)):
        length = int(rollouts.lengths[row])
        tokens = torch.tensor([[*rollouts.prompts[row], *rollouts.responses[row, :length].tolist()]])
        with torch.no_grad():
            logits = pair.student(tokens).logits[0, len(rollouts.prompts[row]) - 1 : -1, : pair.vocabulary_size]
        logits.requires_grad_()
        places = row * rollouts.mask.shape[1] + torch.arange(length)
        positions = Positions(batch, places, logits, pair.teacher, pair.vocabulary_size)
        loss = sum(
            term.weight * term.loss(positions, positions.take(term.mask)) for term in method.terms(batch, step=0)
        )
        update = -torch.autograd.grad(loss, logits)[0] * int(rollouts.mask.sum())
        listed = view.listed_tokens[row, :length]
        assert torch.allclose(view.updates[name][row, :length], update.gather(-1, listed), atol=2e-4)
        assert torch.allclose(view.weights[name][row, :length].abs(), update.norm(dim=-1), atol=2e-4)
        sign = update.gather(-1, rollouts.responses[row, :length, None])[:, 0].sign()
        clear = update.norm(dim=-1) > 1e-3
        assert torch.equal(view.weights[name][row, :length].sign()[clear], sign[clear])
    everywhere = view_guidance(pair, rollouts, advantages=advantages, top_k=5)
    closed = not torch.equal(view.updates[name], everywhere.updates[name])
    assert closed == (name == "tgpo" and gate == "trust_horizon"), "the gate shuts nowhere, or touches another method"


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_numbers_are_those_of_plain_forward_passes(pair, rollouts, temperature):
    """One row at a time, in float64, without padding; the shift by one is written out."""
    view = view_guidance(pair, rollouts, temperature=temperature, top_k=4)
    for row in range(len(rollouts)):
        prompt, length = rollouts.prompts[row], int(rollouts.lengths[row])
        response = rollouts.responses[row, :length].tolist()
        with torch.no_grad():
            student, teacher = (
                m(torch.tensor([prompt + response])).logits[0].double() for m in (pair.student, pair.teacher)
            )
        for place, token in enumerate(response):
            at = len(prompt) + place - 1
            own, theirs = (student[at] / (temperature or 1)).log_softmax(-1), teacher[at].log_softmax(-1)
            found = {
                "student_logprobs": own[token],
                "teacher_logprobs": theirs[token],
                "student_entropy": -(own.exp() * own).sum(),
                "teacher_entropy": -(theirs.exp() * theirs).sum(),
            }
            proposal = int(theirs.argmax())
            found["student_proposal_logprobs"] = own[proposal]
            for name, expected in found.items():
                assert getattr(view, name)[row, place].item() == pytest.approx(expected.item(), abs=2e-4), name
            # Every place of the order, except that rounding may swap neighbours.
            ranks = {"student_ranks": (own, token), "teacher_ranks": (theirs, token),
                     "student_proposal_ranks": (own, proposal)}  # fmt: skip
            for name, (logprobs, which) in ranks.items():
                order = sorted(range(len(logprobs)), key=lambda v: -logprobs[v])
                assert abs(getattr(view, name)[row, place].item() - (1 + order.index(which))) <= 1, name
            for who, logprobs in (("student", own), ("teacher", theirs)):
                best, tokens = logprobs.topk(4)
                assert getattr(view, f"{who}_top_tokens")[row, place].tolist() == tokens.tolist()
                assert getattr(view, f"{who}_top_logprobs")[row, place].tolist() == pytest.approx(
                    best.tolist(), abs=2e-4
                )
                assert getattr(view, f"{who}_best")[row, place].item() == int(tokens[0])
            quantities = {name: float(values[row, place]) for name, values in view.quantities().items()}
            assert quantities["token_reward"] == pytest.approx((theirs - own)[token].item(), abs=4e-4)
            assert quantities["student_surprise"] == pytest.approx(-own[token].item(), abs=2e-4)
            assert quantities["teacher_surprise"] == pytest.approx(-theirs[token].item(), abs=2e-4)
            assert quantities["agreement"] == float(int(own.argmax()) == int(theirs.argmax()))
            assert bool(view.differs[row, place]) == (int(theirs.argmax()) != token)
        assert not any(values[row, length:].any() for values in view.quantities().values())


def test_micro_batches_change_nothing_but_rounding(pair, rollouts, advantages):
    whole = view_guidance(pair, rollouts, advantages=advantages)
    parts = view_guidance(pair, rollouts, advantages=advantages, micro_batch_tokens=1)
    for name, values in whole.quantities().items():
        assert torch.allclose(values, parts.quantities()[name], atol=2e-4), name


def test_the_teacher_as_its_own_student_gets_nothing_from_distillation(pair, rollouts):
    view = view_guidance(pair, rollouts, model=pair.teacher)
    assert view.agreement[rollouts.mask].all() and view.weights["exact-rkl"].abs().max() < 1e-3
    assert view.weights["rkl"].abs().max() < 1e-3 and not view.weights["grpo"].any()


def test_the_most_probable_token_has_rank_1(pair, rollouts):
    view = view_guidance(pair, rollouts)
    first = view.rollouts.responses == view.student_best
    assert torch.equal((view.student_ranks == 1) & rollouts.mask, first & rollouts.mask)
    assert torch.equal((view.teacher_ranks == 1) & rollouts.mask, ~view.differs & rollouts.mask)
    assert not view.student_ranks[~rollouts.mask].any() and view.student_proposal_ranks[rollouts.mask].min() >= 1


def test_viewing_leaves_no_gradient(pair, rollouts):
    view_guidance(pair, rollouts)
    assert all(parameter.grad is None for parameter in pair.student.parameters())


def test_a_group_is_the_neighbours_with_one_prompt():
    rows = Rollouts(
        [[1], [1], [2], [1], [1], [1]],
        torch.zeros(6, 1, dtype=torch.long),
        torch.ones(6, 1, dtype=torch.bool),
        torch.ones(6, dtype=torch.bool),
        0,
    )
    # (1, 0): mean ½, deviation √½. (1) is alone. (1, 0, 0): mean ⅓, deviation √⅓.
    found = advantages_by_prompt(rows, torch.tensor([1.0, 0, 1, 1, 0, 0])).tolist()
    assert found == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5), 0, 2 / math.sqrt(3), -(3**-0.5), -(3**-0.5)])


def test_the_table_has_the_numbers_of_the_view(pair, rollouts, advantages):
    view = view_guidance(pair, rollouts, advantages=advantages)
    frame = view.frame(pair, 2, [1, 0])
    assert frame["position"].tolist() == [1, 0]
    assert frame["token_id"].tolist() == rollouts.responses[2, [1, 0]].tolist()
    assert frame["token"].tolist() == [visible_text(pair.tokenizer, t) for t in frame["token_id"]]
    assert frame["proposal_id"].tolist() == view.teacher_best[2, [1, 0]].tolist()
    columns = {
        "student_logprob": view.student_logprobs,
        "teacher_logprob": view.teacher_logprobs,
        "student_rank": view.student_ranks,
        "teacher_rank": view.teacher_ranks,
        "proposal_student_logprob": view.student_proposal_logprobs,
        "proposal_student_rank": view.student_proposal_ranks,
    }
    for name, values in columns.items():
        assert frame[name].tolist() == values[2, [1, 0]].tolist(), name
    for name, values in view.quantities().items():
        assert frame[name].tolist() == values[2, [1, 0]].tolist(), name
    assert frame["agreement"].dtype == bool
    assert len(view.frame(pair, 2)) == int(rollouts.lengths[2])


@pytest.mark.parametrize(("row", "positions", "message"), [(8, None, "no response 8"), (0, [99], "no token 99")])
def test_a_table_of_what_is_not_there_is_refused(pair, rollouts, row, positions, message):
    with pytest.raises(InputError, match=message):
        view_guidance(pair, rollouts).frame(pair, row, positions)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"top_k": 0}, "top_k must be from 1"), ({"top_k": 10**6}, "top_k"), ({"temperature": -1.0}, "temperature")],
)
def test_impossible_options_are_refused(pair, rollouts, options, message):
    with pytest.raises(InputError, match=message):
        view_guidance(pair, rollouts, **options)
