"""Expected gradients by exact enumeration: every token a student could draw, weighted with its probability.

The references are central differences of divergences written with plain floats.
"""

import itertools
import math
from functools import partial

import pytest
import torch

from tgpo_lab import losses

STUDENT = [0.4, -1.1, 0.9, 0.0, -0.3]
TEACHER = [-0.7, 1.2, 0.1, 0.8, -2.0]
OTHER_TEACHER = [1.5, -0.4, 0.3, -1.0, 0.6]
TOKENS = [torch.tensor([[v]]) for v in range(5)]
ONE = torch.ones(1, 1)
INF = math.inf


def at(values) -> torch.Tensor:
    """One position: (1, 1, V) logits or a (1, 1) number."""
    return torch.tensor([[values]], dtype=torch.float64)


def probabilities(logits: list[float]) -> list[float]:
    weights = [math.exp(x) for x in logits]
    return [w / sum(weights) for w in weights]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def reverse(student: list[float], teacher: list[float] = TEACHER) -> float:
    return kl(probabilities(student), probabilities(teacher))


def forward(student: list[float], teacher: list[float] = TEACHER) -> float:
    return kl(probabilities(teacher), probabilities(student))


def jsd(student: list[float], beta: float) -> float:
    p, q = probabilities(student), probabilities(TEACHER)
    mixture = [beta * b + (1 - beta) * a for a, b in zip(p, q, strict=True)]
    return beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)


def slope(function, x: list[float], h: float = 1e-5) -> list[float]:
    def moved(i, by):
        return function([v + by * (i == j) for j, v in enumerate(x)])

    return [(moved(i, h) - moved(i, -h)) / (2 * h) for i in range(len(x))]


def same(values) -> object:
    return pytest.approx(list(values), abs=1e-8)


def apart(one, other) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def gradient(loss_of_logits) -> list[float]:
    logits = at(STUDENT).requires_grad_()
    loss_of_logits(logits).backward()
    return logits.grad.flatten().tolist()


def expectation(weights: list[float], vectors: list[list[float]]) -> list[float]:
    return [sum(w * v for w, v in zip(weights, column, strict=True)) for column in zip(*vectors, strict=True)]


def by_token(loss_of_sample, teacher: list[float]) -> list[list[float]]:
    """Gradient of the loss, a function of log πθ(v) and log πT(v), for every token v."""

    def loss(logits, token):
        return loss_of_sample(losses.token_logprobs(logits, token), losses.token_logprobs(at(teacher), token))

    return [gradient(lambda x, v=token: loss(x, v)) for token in TOKENS]


def expected(loss_of_sample, teacher: list[float] = TEACHER) -> list[float]:
    return expectation(probabilities(STUDENT), by_token(loss_of_sample, teacher))


def sampled(estimator):
    return lambda s, t: losses.masked_sum(losses.sampled_kl(s, t, estimator), ONE)


def policy_gradient(advantage):
    return lambda s, t: losses.policy_gradient_loss(s, s.detach(), advantage(s, t), ONE)


def kdrl(s, t):
    return losses.kdrl_loss(s, t, ONE)


def top_k(teacher: list[float], k: int):
    logprobs, tokens = at(teacher).log_softmax(-1).topk(k)
    return lambda x: losses.top_k_guidance_loss(x, tokens, logprobs, ONE)


REVERSE_SLOPE, FORWARD_SLOPE = slope(reverse, STUDENT), slope(forward, STUDENT)


def test_k1_as_a_loss_has_zero_expected_gradient_and_nothing_of_the_teacher_in_it():
    assert expected(sampled("k1")) == same([0] * 5)
    each = by_token(sampled("k1"), TEACHER)
    assert each == by_token(sampled("k1"), OTHER_TEACHER)
    assert min(max(map(abs, one)) for one in each) > 0.1  # each sample does push, in vain


@pytest.mark.parametrize(
    "loss, target",
    [
        pytest.param(sampled("k2"), REVERSE_SLOPE, id="k2 reverse KL"),
        pytest.param(sampled("k3"), FORWARD_SLOPE, id="k3 forward KL"),
        pytest.param(kdrl, REVERSE_SLOPE, id="KDRL reverse KL"),
        pytest.param(policy_gradient(losses.reverse_kl_advantage), REVERSE_SLOPE, id="policy gradient reverse KL"),
    ],
)
def test_a_loss_of_sampled_tokens_has_the_expected_gradient_of_its_divergence(loss, target):
    assert apart(REVERSE_SLOPE, FORWARD_SLOPE) > 0.05  # far enough to tell them
    assert expected(loss) == same(target)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_policy_gradient_with_another_estimator_as_advantage_is_not_reverse_kl(estimator):
    found = expected(policy_gradient(lambda s, t: -losses.sampled_kl(s, t, estimator)))
    assert apart(found, REVERSE_SLOPE) > 0.05


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
def test_exact_divergences_have_the_gradients_of_their_references(beta):
    found = gradient(lambda x: losses.generalized_jsd(x, at(TEACHER), ONE, beta))
    assert found == same(slope({0: forward, 1: reverse}.get(beta, lambda x: jsd(x, beta)), STUDENT))
    assert gradient(lambda x: losses.reverse_kl(x, at(TEACHER), ONE)) == same(REVERSE_SLOPE)
    assert gradient(lambda x: losses.forward_kl(x, at(TEACHER), ONE)) == same(FORWARD_SLOPE)


# Each takes a teacher and gives the (expected) gradient at the student.
DISTILLATION = {
    "reverse_kl": lambda t: gradient(lambda x: losses.reverse_kl(x, at(t), ONE)),
    "forward_kl": lambda t: gradient(lambda x: losses.forward_kl(x, at(t), ONE)),
    "generalized_jsd": lambda t: gradient(lambda x: losses.generalized_jsd(x, at(t), ONE, 0.5)),
    "kdrl_loss": lambda t: expected(kdrl, t),
    "policy gradient": lambda t: expected(policy_gradient(losses.reverse_kl_advantage), t),
    "guidance_loss": lambda t: gradient(lambda x: losses.guidance_loss(x, at(t).argmax(-1), ONE)),
    "top_k_guidance_loss": lambda t: gradient(top_k(t, 3)),
}


@pytest.mark.parametrize("name", DISTILLATION)
def test_every_distillation_gradient_depends_on_the_teacher(name):
    assert apart(DISTILLATION[name](TEACHER), DISTILLATION[name](OTHER_TEACHER)) > 0.05


@pytest.mark.parametrize("name", [n for n in DISTILLATION if "guidance" not in n])
def test_a_teacher_equal_to_the_student_gives_no_gradient(name):
    assert DISTILLATION[name]([x + 3 for x in STUDENT]) == same([0] * 5)


def test_guidance_raises_the_teachers_token_and_no_other_even_for_a_teacher_equal_to_the_student():
    found = DISTILLATION["guidance_loss"](STUDENT)
    assert found == same(p - (token == 2) for token, p in enumerate(probabilities(STUDENT)))
    assert [g < 0 for g in found] == [False, False, True, False, False]


def test_guidance_by_tokens_sampled_from_the_teacher_has_the_expected_gradient_of_forward_kl():
    each = [gradient(lambda x, v=token: losses.guidance_loss(x, v, ONE)) for token in TOKENS]
    assert expectation(probabilities(TEACHER), each) == same(FORWARD_SLOPE)


def test_top_k_guidance_pulls_mass_into_the_list_until_the_student_has_none_outside():
    p, q = probabilities(STUDENT), probabilities(TEACHER)
    listed = sorted(range(5), key=q.__getitem__)[-3:]
    mass = sum(q[i] for i in listed)
    assert mass < 0.95
    assert gradient(top_k(TEACHER, 3)) == same(p[i] - (q[i] / mass if i in listed else 0) for i in range(5))
    assert gradient(top_k(TEACHER, 5)) == same(FORWARD_SLOPE)


@pytest.mark.parametrize(
    "ratio, advantage, low, high, loss, slope_by_logprob",  # the slope of −ρA by log πθ is −ρA, or 0 where clipped
    [
        (1.0, 2.0, 0.2, 0.2, -2.0, -2.0),
        (1.0, -2.0, 0.2, 0.2, 2.0, 2.0),
        (1.5, 2.0, 0.2, 0.2, -2.4, 0.0),  # good and already likelier: clipped at 1.2
        (1.5, -2.0, 0.2, 0.2, 3.0, 3.0),  # bad and likelier: never clipped
        (0.5, 2.0, 0.2, 0.2, -1.0, -1.0),  # good and rarer: never clipped
        (0.5, -2.0, 0.2, 0.2, 1.6, 0.0),  # bad and already rarer: clipped at 0.8
        (1.25, 1.0, 0.2, 0.28, -1.25, -1.25),  # clip-higher lets 1.25 through …
        (1.25, 1.0, 0.2, 0.2, -1.2, 0.0),  # … which 0.2 does not
        (1.3, 1.0, 0.2, 0.28, -1.28, 0.0),
        (0.75, -1.0, 0.2, 0.28, 0.8, 0.0),  # and it leaves the lower side alone
        (0.75, -1.0, 0.28, 0.2, 0.75, 0.75),
        (10.0, 1.0, INF, INF, -10.0, -10.0),
        (0.01, -1.0, INF, INF, 0.01, 0.01),
    ],
)
def test_policy_gradient_clips_each_side_only_where_the_step_was_already_made(
    ratio, advantage, low, high, loss, slope_by_logprob
):
    logprobs, behaviour, advantages = (at(x).requires_grad_() for x in (-1.5 + math.log(ratio), -1.5, advantage))
    found = losses.policy_gradient_loss(logprobs, behaviour, advantages, ONE, low, high)
    found.backward()
    assert (found.item(), logprobs.grad.item()) == pytest.approx((loss, slope_by_logprob), abs=1e-12)
    assert behaviour.grad is None and advantages.grad is None
    if low == high == 0.2:
        assert losses.policy_gradient_loss(logprobs, behaviour, advantages, ONE).item() == found.item()


@pytest.mark.parametrize(
    "p, advantage, options, loss, slope_by_logprob",  # −A·p/(p + γ) and −A·γp/(p + γ)²; γ is 0.1 if not given
    [(0.4, 2.0, {}, -1.6, -0.32), (0.1, -1.0, {"gamma": 0.1}, 0.5, 0.25), (0.4, 1.0, {"gamma": 0.4}, -0.5, -0.25)],
)
def test_luffy_loss_and_gradient_by_hand(p, advantage, options, loss, slope_by_logprob):
    logprobs, advantages = at(math.log(p)).requires_grad_(), at(advantage).requires_grad_()
    found = losses.luffy_off_policy_loss(logprobs, advantages, ONE, **options)
    found.backward()
    assert (found.item(), logprobs.grad.item()) == pytest.approx((loss, slope_by_logprob))
    assert advantages.grad is None


def test_no_gradient_reaches_the_teacher():
    student, teacher = at(STUDENT).requires_grad_(), at(TEACHER).requires_grad_()
    own, theirs = (losses.token_logprobs(x, TOKENS[1]) for x in (student, teacher))
    terms = [losses.reverse_kl(student, teacher, ONE), losses.forward_kl(student, teacher, ONE)]
    terms += [losses.generalized_jsd(student, teacher, ONE, 0.3), losses.kdrl_loss(own, theirs, ONE)]
    terms += [losses.top_k_guidance_loss(student, torch.tensor([[[0, 3]]]), teacher[..., :2], ONE)]
    terms += [losses.sampled_kl(own, theirs, k).sum() for k in ("k1", "k2", "k3")]
    (sum(terms) + losses.reverse_kl_advantage(own, theirs).sum()).backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0.1


# ---- log-probabilities of tokens, whose gradient is written by hand ----------


def logits_and_tokens(scale: float = 1.0, dtype=torch.float64, shape=(3, 4, 9)):
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    return logits, torch.randint(shape[-1], shape[:-1], generator=generator)


def picked_from_log_softmax(logits, tokens):
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def test_the_gradient_of_a_tokens_log_probability_is_that_of_finite_differences():
    logits, tokens = logits_and_tokens()
    assert torch.autograd.gradcheck(lambda x: losses.token_logprobs(x, tokens), logits)


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_and_gradient_of_a_tokens_log_probability_are_those_of_log_softmax(scale, dtype):
    logits, tokens = logits_and_tokens(scale, dtype, (5, 6, 300))
    with torch.no_grad():
        logits[0, 0] = -1e30  # all the same, far from zero
        logits[1, :, 7:] = -INF  # impossible tokens, the one asked about among them
        logits[2, 0] = torch.arange(300) * -1e3
        logits[3, :, 4] = 80.0
    truth = logits.detach().double().requires_grad_()
    weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, expected = losses.token_logprobs(logits, tokens), picked_from_log_softmax(truth, tokens)
    found.backward(weights.to(dtype))
    expected.backward(weights)
    precision = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-7, "atol": 2e-6}
    torch.testing.assert_close(found.double(), expected, **precision)
    torch.testing.assert_close(logits.grad.double(), truth.grad, **precision)
    assert found.dtype == logits.grad.dtype == dtype


def test_several_tokens_of_a_position_are_as_good_as_one_call_for_each():
    logits, tokens = logits_and_tokens()
    several = torch.stack([tokens, tokens, (tokens + 4) % 9], -1)  # (3, 4, 3), the first token twice
    weights = torch.randn(several.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = losses.token_logprobs(logits, several)
    expected = torch.stack([picked_from_log_softmax(logits, several[..., k]) for k in range(3)], -1)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad((weights * x).sum(), logits)[0] for x in (found, expected))
    torch.testing.assert_close(*gradients)


def test_the_same_graph_gives_the_same_gradient_twice_and_adds_up_with_other_uses_of_the_logits():
    logits, tokens = logits_and_tokens()
    before = logits.detach().clone()
    logprobs = losses.token_logprobs(logits, tokens)
    first, again = (torch.autograd.grad(logprobs.sum(), logits, retain_graph=True)[0] for _ in range(2))
    (third,) = torch.autograd.grad(2 * logprobs.sum() + logits.sum(), logits)
    assert torch.equal(first, again)
    torch.testing.assert_close(third, 2 * first + 1)
    assert torch.equal(logits, before)


def test_a_second_derivative_is_refused_and_not_taken_for_zero():
    logits, tokens = logits_and_tokens()
    with pytest.raises(RuntimeError, match=r"differentiated once.*create_graph"):
        torch.autograd.grad(losses.token_logprobs(logits, tokens).sum() + logits.sum(), logits, create_graph=True)


@pytest.mark.parametrize("divergence", [losses.reverse_kl_per_token, losses.forward_kl_per_token])
def test_a_kl_is_differentiated_once_and_leaves_its_inputs_alone(divergence):
    logits, teacher = at(STUDENT).requires_grad_(), at(TEACHER)
    with pytest.raises(RuntimeError, match=r"differentiated once.*create_graph"):
        torch.autograd.grad(divergence(logits, teacher).sum(), logits, create_graph=True)
    value = divergence(logits, teacher).sum()
    twice = [torch.autograd.grad(value, logits, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*twice) and value.item() == divergence(logits.detach(), teacher).sum().item()
    assert logits.flatten().tolist() == STUDENT and teacher.flatten().tolist() == TEACHER


@pytest.mark.parametrize("divergence", [losses.reverse_kl_per_token, losses.forward_kl_per_token])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_kl_of_two_precisions_has_gradients_of_the_students(divergence, dtypes):
    logits, teacher = (at(x).to(dtype) for x, dtype in zip((STUDENT, TEACHER), dtypes, strict=True))
    logits.requires_grad_()
    divergence(logits, teacher).sum().backward()
    exact = at(STUDENT).requires_grad_()
    divergence(exact, at(TEACHER)).sum().backward()
    assert logits.grad.dtype == dtypes[0] and torch.allclose(logits.grad.double(), exact.grad, atol=0.02)


# ---- whole sequences, V = 3 and T = 2: logits of the first token, then of the second after each first token ----------

SEQUENCES = [[0.2, -0.5, 0.9], [1.1, 0.3, -0.8], [-0.6, 0.0, 0.7], [0.5, -1.2, 0.1]]
TEACHER_SEQUENCES = [[-0.4, 1.0, 0.1], [-1.0, 0.6, 0.9], [1.3, -0.2, 0.0], [0.4, 0.8, -0.9]]


def expected_over_sequences(loss_of_sequence) -> list[float]:
    """Expected gradient over all nine sequences; the loss gets logits of both, (1, 2, 3), and tokens, (1, 2)."""
    weights, gradients = [], []
    for first, second in itertools.product(range(3), repeat=2):
        weights.append(probabilities(SEQUENCES[0])[first] * probabilities(SEQUENCES[1 + first])[second])
        table, rows = torch.tensor(SEQUENCES, dtype=torch.float64, requires_grad=True), torch.tensor([[0, 1 + first]])
        teacher = torch.tensor(TEACHER_SEQUENCES, dtype=torch.float64)[rows]
        loss_of_sequence(table[rows], teacher, torch.tensor([[first, second]])).backward()
        gradients.append(table.grad.flatten().tolist())
    return expectation(weights, gradients)


def test_over_sequences_all_reverse_kl_losses_agree_on_fixed_prefixes_and_ignore_later_states():
    mask, picked = torch.ones(1, 2), losses.token_logprobs

    def sequence_kl(flat, prefix):  # KL of the first token and of the second, weighted with the first's probabilities
        return sum(w * reverse(flat[3 * i : 3 * i + 3], TEACHER_SEQUENCES[i]) for i, w in enumerate([1, *prefix]))

    def policy(credit, s, t, tokens):
        own = picked(s, tokens)
        advantage = credit(losses.reverse_kl_advantage(own, picked(t, tokens)))
        return losses.policy_gradient_loss(own, own, advantage, mask, normalizer=1)

    flat = list(itertools.chain(*SEQUENCES))
    fixed = slope(lambda x: sequence_kl(x, probabilities(SEQUENCES[0])), flat)
    whole = slope(lambda x: sequence_kl(x, probabilities(x[:3])), flat)
    assert apart(fixed, whole) > 0.05
    for loss in (
        lambda s, t, tokens: losses.reverse_kl(s, t, mask, normalizer=1),
        lambda s, t, tokens: losses.kdrl_loss(picked(s, tokens), picked(t, tokens), mask, normalizer=1),
        partial(policy, lambda a: a),
    ):
        assert expected_over_sequences(loss) == same(fixed)
    # The return to go, credit for what follows, is what it takes to get the divergence of whole responses.
    assert expected_over_sequences(partial(policy, lambda a: a.flip(1).cumsum(1).flip(1))) == same(whole)
