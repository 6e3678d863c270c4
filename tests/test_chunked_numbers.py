"""Losses and answers computed a few positions at a time, against plain (B, T, V) tensors of the whole models.

The reference takes the logits of each model's own forward pass, shifts them by one row by row, and writes every
quantity out from its definition. What is compared is the package's way from rollouts to gradients: the student's pass,
the teacher's answers, and the projections from kept hidden states.
"""

import contextlib

import pytest
import torch
from accelerate import Accelerator

from tgpo_lab import teacher
from tgpo_lab.batch import Batch
from tgpo_lab.loop import student_pass
from tgpo_lab.loop.student_pass import StudentPass, accumulate_gradients
from tgpo_lab.losses import entropy, forward_kl, guidance_loss, masked_sum, reverse_kl, top_k_guidance_loss
from tgpo_lab.methods.base import Term
from tgpo_lab.micro_batches import split_rows
from tgpo_lab.models.pairs import load_pair
from tgpo_lab.rollouts import Rollouts
from tgpo_lab.teacher import ask_teacher

LENGTHS = [(3, 7), (1, 2), (5, 9), (2, 1), (4, 4)]  # prompt and response tokens; 23 positions in all
CUT = 2040  # tokens from here on are cut away, as padded rows of a vocabulary are
K = 5


def make_rollouts():
    generator = torch.Generator().manual_seed(3)
    width = max(response for _, response in LENGTHS)
    mask = torch.tensor([[t < response for t in range(width)] for _, response in LENGTHS])
    responses = torch.randint(0, CUT, mask.shape, generator=generator) * mask
    prompts = [torch.randint(0, CUT, (prompt,), generator=generator).tolist() for prompt, _ in LENGTHS]
    return Rollouts(prompts, responses, mask, torch.ones(len(mask), dtype=torch.bool), pad_token=0)


def aligned(model, rollouts):
    """(B, T, V) log-probabilities: the plain version, zero at padding."""
    rows = []
    for prompt, response, mask in zip(rollouts.prompts, rollouts.responses, rollouts.mask, strict=True):
        tokens = torch.tensor([prompt + response[mask].tolist()])
        logits = model(tokens).logits[0, len(prompt) - 1 : -1, :CUT]
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
        rows.append(torch.nn.functional.pad(logits.log_softmax(-1), (0, 0, 0, len(mask) - len(logits))))
    return torch.stack(rows)


@pytest.fixture
def double(random_pair):
    """The random pair in float64, which tensors made on the way take over."""
    torch.set_default_dtype(torch.float64)
    pair = load_pair(random_pair.student, random_pair.teacher)
    pair.student.double()
    pair.teacher.double()
    pair.vocabulary_size = CUT
    yield pair
    torch.set_default_dtype(torch.float32)


# Losses by name: the package's on positions, and the sum over (B, T) from the definition.
LOSSES = {
    "sampled log-probabilities": (
        lambda p, mask: -masked_sum(p.logprobs, mask, 23),
        lambda own, theirs, tokens: -own.gather(-1, tokens.unsqueeze(-1)).squeeze(-1),
    ),
    "entropy": (
        lambda p, mask: masked_sum(entropy(p.logits), mask, 23),
        lambda own, theirs, tokens: -(own.exp() * own).sum(-1),
    ),
    "reverse KL": (
        lambda p, mask: reverse_kl(p.logits, p.teacher_logits(), mask, 23),
        lambda own, theirs, tokens: (own.exp() * (own - theirs)).sum(-1),
    ),
    "forward KL": (
        lambda p, mask: forward_kl(p.logits, p.teacher_logits(), mask, 23),
        lambda own, theirs, tokens: (theirs.exp() * (theirs - own)).sum(-1),
    ),
    "argmax guidance": (
        lambda p, mask: guidance_loss(p.logits, p.take(p.batch.teacher.tokens), mask, 23),
        lambda own, theirs, tokens: -own.gather(-1, theirs.argmax(-1, keepdim=True)).squeeze(-1),
    ),
    "top-k guidance": (
        lambda p, mask: top_k_guidance_loss(
            p.logits, p.take(p.batch.teacher.top_tokens), p.take(p.batch.teacher.top_logprobs), mask, 23
        ),
        lambda own, theirs, tokens: top_k_by_definition(own, theirs),
    ),
}


def top_k_by_definition(own, theirs):
    values, places = theirs.sort(-1, descending=True)
    weights = values[..., :K].exp() / values[..., :K].exp().sum(-1, keepdim=True)
    return -(weights * own.gather(-1, places[..., :K])).sum(-1)


def chunked(pair, rollouts, name, positions, limit, monkeypatch, autocast=contextlib.nullcontext, temperature=1.0):
    """Value of a loss and the student's gradients, with so many positions at a time and so many tokens at once."""
    for module in (student_pass, teacher):
        monkeypatch.setattr(module, "positions_at_once", lambda vocabulary_size, device: positions)
    answers = ask_teacher(
        pair.teacher, rollouts, vocabulary_size=CUT, micro_batch_tokens=limit, keep_distribution=rollouts.mask, top_k=K
    )
    batch = Batch(
        rollouts, torch.zeros(len(rollouts), dtype=torch.bool), torch.zeros(len(rollouts)), answers, None, 1, 9,
        torch.Generator(),
    )  # fmt: skip
    pair.student.zero_grad()
    passes = (StudentPass(batch, rows, pair, temperature, autocast) for rows in split_rows(rollouts, limit))
    term = Term("teacher", rollouts.mask, LOSSES[name][0])
    value = accumulate_gradients(passes, [term], Accelerator(cpu=True), autocast)["loss_teacher"]
    return float(value), {name: p.grad.clone() for name, p in pair.student.named_parameters()}


def plain(pair, rollouts, name, temperature=1.0):
    """The same from whole tensors."""
    pair.student.zero_grad()
    with torch.no_grad():
        theirs = aligned(pair.teacher, rollouts)
    own = (aligned(pair.student, rollouts) / temperature).log_softmax(-1)
    value = LOSSES[name][1](own, theirs, rollouts.responses)[rollouts.mask].sum() / 23
    value.backward()
    return float(value.detach()), {name: p.grad.clone() for name, p in pair.student.named_parameters()}


@pytest.mark.parametrize("name", LOSSES)
def test_in_float64_chunks_give_the_numbers_of_whole_tensors_forward_and_backward(double, monkeypatch, name):
    rollouts = make_rollouts()
    expected, gradients = plain(double, rollouts, name)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert largest > 1e-3
    for positions, limit in ((1, 1000), (4, 1000), (1000, 1000), (3, 20)):
        value, found = chunked(double, rollouts, name, positions, limit, monkeypatch)
        assert value == pytest.approx(expected, rel=1e-12)
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(found[parameter], gradient, rtol=1e-9, atol=1e-12 * largest, msg=parameter)


@pytest.mark.parametrize("name", LOSSES)
def test_the_students_policy_is_that_of_the_temperature_and_the_teachers_is_its_own(double, monkeypatch, name):
    rollouts = make_rollouts()
    expected, gradients = plain(double, rollouts, name, temperature=0.7)
    assert expected != pytest.approx(plain(double, rollouts, name)[0], rel=1e-3)
    value, found = chunked(double, rollouts, name, 4, 20, monkeypatch, temperature=0.7)
    assert value == pytest.approx(expected, rel=1e-12)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-9, atol=1e-12 * largest, msg=parameter)


@pytest.mark.parametrize(("positions", "limit"), [(1, 1000), (4, 1000), (1000, 1000), (3, 20)])
def test_in_float64_the_teachers_answers_are_those_of_whole_tensors(double, monkeypatch, positions, limit):
    rollouts = make_rollouts()
    monkeypatch.setattr(teacher, "positions_at_once", lambda vocabulary_size, device: positions)
    answers = ask_teacher(double.teacher, rollouts, vocabulary_size=CUT, micro_batch_tokens=limit, top_k=K)
    with torch.no_grad():
        theirs = aligned(double.teacher, rollouts)
    mask = rollouts.mask
    assert torch.equal(answers.tokens[mask], theirs.argmax(-1)[mask])
    assert torch.equal(answers.top_tokens[mask], theirs.sort(-1, descending=True).indices[..., :K][mask])
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(answers.confidence[mask], theirs.amax(-1)[mask], **exact)
    torch.testing.assert_close(
        answers.top_logprobs[mask], theirs.sort(-1, descending=True).values[..., :K][mask], **exact
    )
    sampled = theirs.gather(-1, rollouts.responses.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(answers.logprobs[mask], sampled[mask], **exact)


# Against float32, bfloat16 may move a loss by 0.2 % and a gradient by 5 % of the largest one (measured: up to 0.04 %
# and 2.5 %, the latter of the forward KL). How positions are split may move the loss by 0.001 % and a gradient by 1 %
# of the largest (measured: 0.00002 % and 0.4 %).
VALUE, GRADIENT, SPLIT_VALUE, SPLIT_GRADIENT = 2e-3, 0.05, 1e-5, 0.01


@pytest.mark.parametrize("name", LOSSES)
def test_in_bfloat16_chunks_stay_within_the_stated_tolerance(random_pair, monkeypatch, name):
    rollouts = make_rollouts()
    exact = load_pair(random_pair.student, random_pair.teacher)
    half = load_pair(random_pair.student, random_pair.teacher, dtype=torch.bfloat16)  # as a run in bfloat16 has it
    exact.vocabulary_size = half.vocabulary_size = CUT
    expected, gradients = plain(exact, rollouts, name)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    results = [chunked(half, rollouts, name, positions, limit, monkeypatch, autocast)
               for positions, limit in ((1000, 1000), (1, 1000), (3, 20))]  # fmt: skip
    for value, found in results:
        assert value == pytest.approx(expected, rel=VALUE)
        assert value == pytest.approx(results[0][0], rel=SPLIT_VALUE)
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(found[parameter], gradient, rtol=0, atol=GRADIENT * largest, msg=parameter)
            torch.testing.assert_close(
                found[parameter], results[0][1][parameter], rtol=0, atol=SPLIT_GRADIENT * largest
            )
