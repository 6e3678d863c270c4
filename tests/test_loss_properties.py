"""What must hold for any batch: padding, packing, order and offsets never matter; divergences keep their bounds."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tgpo_lab import losses

pairs = partial(zip, strict=True)
few = settings(max_examples=30, deadline=None, derandomize=True, database=None)


def make_batch(rows, length, vocabulary=6, scale=1.0, seed=0, mask=None) -> SimpleNamespace:
    g, shape = torch.Generator().manual_seed(seed), (rows, length)

    def noise(*more):
        return scale * torch.randn(*shape, *more, generator=g, dtype=torch.float64)

    return SimpleNamespace(
        student=noise(vocabulary),
        teacher=noise(vocabulary),
        tokens=torch.randint(vocabulary, shape, generator=g),
        top_tokens=torch.rand(*shape, vocabulary, generator=g).argsort(-1)[..., :2],
        top_logprobs=noise(2),
        behaviour=noise() - 1.5,
        advantages=noise(),
        weights=torch.rand(shape, generator=g, dtype=torch.float64),
        mask=torch.ones(shape, dtype=torch.bool) if mask is None else torch.tensor(mask).view(shape),
    )


@st.composite
def batches(draw) -> SimpleNamespace:
    rows, length, vocabulary = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(2, 7))
    mask = draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length))
    scale, seed = draw(st.sampled_from([0.0, 0.1, 1.0, 5.0])), draw(st.integers(0, 2**31))
    return make_batch(rows, length, vocabulary, scale, seed, mask)


def own(x) -> torch.Tensor:
    return losses.token_logprobs(x.student, x.tokens)


LOSSES = {
    "reverse_kl": lambda x, n=None: losses.reverse_kl(x.student, x.teacher, x.mask, n),
    "forward_kl": lambda x, n=None: losses.forward_kl(x.student, x.teacher, x.mask, n),
    "jsd": lambda x, n=None: losses.generalized_jsd(x.student, x.teacher, x.mask, 0.3, n),
    "policy": lambda x, n=None: losses.policy_gradient_loss(own(x), x.behaviour, x.advantages, x.mask, 0.2, 0.28, n),
    "guidance": lambda x, n=None: losses.guidance_loss(x.student, x.top_tokens[..., 0], x.mask, n),
    "top-k": lambda x, n=None: losses.top_k_guidance_loss(x.student, x.top_tokens, x.top_logprobs, x.mask, n),
    "weighted guidance": lambda x, n=None: losses.guidance_loss(x.student, x.top_tokens[..., 0], x.mask, n, x.weights),
    "weighted top-k": lambda x, n=None: losses.top_k_guidance_loss(
        x.student, x.top_tokens, x.top_logprobs, x.mask, n, x.weights
    ),
    "weighted forward_kl": lambda x, n=None: losses.forward_kl(x.student, x.teacher, x.mask, n, x.weights),
    "kdrl": lambda x, n=None: losses.kdrl_loss(own(x), losses.token_logprobs(x.teacher, x.tokens), x.mask, n),
    "luffy": lambda x, n=None: losses.luffy_off_policy_loss(own(x), x.advantages, x.mask, 0.1, n),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def probabilities(row: torch.Tensor) -> list[float]:
    weights = [math.exp(x) for x in row.tolist()]
    return [w / sum(weights) for w in weights]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in pairs(p, q))


def jsd(p: list[float], q: list[float], beta: float) -> float:
    mixture = [beta * b + (1 - beta) * a for a, b in pairs(p, q)]
    return beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)


def surrogate(ratio: float, advantage: float) -> float:
    """PPO by cases: a good action earns nothing above 1.28, a bad one nothing below 0.8."""
    return advantage * (min(ratio, 1.28) if advantage > 0 else max(ratio, 0.8))


REFERENCES = {  # at one position: student p, teacher q, and the rest of that position's inputs
    "reverse_kl": lambda p, q, x: kl(p, q),
    "forward_kl": lambda p, q, x: kl(q, p),
    "jsd": lambda p, q, x: jsd(p, q, 0.3),
    "policy": lambda p, q, x: -surrogate(p[x.tokens] / math.exp(x.behaviour), float(x.advantages)),
    "guidance": lambda p, q, x: -math.log(p[x.top_tokens[0]]),
    "top-k": lambda p, q, x: -sum(w * math.log(p[v]) for w, v in pairs(probabilities(x.top_logprobs), x.top_tokens)),
    "weighted guidance": lambda p, q, x: float(x.weights) * REFERENCES["guidance"](p, q, x),
    "weighted top-k": lambda p, q, x: float(x.weights) * REFERENCES["top-k"](p, q, x),
    "weighted forward_kl": lambda p, q, x: float(x.weights) * kl(q, p),
    "kdrl": lambda p, q, x: math.log(p[x.tokens] / q[x.tokens]) ** 2 / 2,
    "luffy": lambda p, q, x: -float(x.advantages) * p[x.tokens] / (p[x.tokens] + 0.1),
}


def changed(x, change) -> SimpleNamespace:
    return SimpleNamespace(**{name: change(name, value) for name, value in vars(x).items()})


@pytest.mark.parametrize("name", LOSSES)
@few
@given(x=batches(), normalizer=st.sampled_from([None, 13.0]))
def test_every_loss_is_the_sum_of_its_reference_over_unmasked_positions_per_normalizer(name, x, normalizer):
    places = x.mask.nonzero().tolist()
    each = [changed(x, lambda _, v, b=b, t=t: v[b, t]) for b, t in places]
    total = sum(REFERENCES[name](probabilities(here.student), probabilities(here.teacher), here) for here in each)
    expected = total / (normalizer or max(1, len(places)))
    assert LOSSES[name](x, normalizer).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@every_loss
def test_micro_batch_means_must_not_be_averaged_but_sums_with_the_global_normalizer_add_up(loss):
    x = make_batch(2, 3, mask=[True] * 4 + [False] * 2)  # rows of 3 and 1 positions
    parts = [changed(x, lambda _, v, b=b: v[b : b + 1]) for b in range(2)]
    whole = loss(x).item()
    assert sum(loss(part, 4).item() for part in parts) == pytest.approx(whole, rel=1e-12)
    assert abs(sum(loss(part).item() for part in parts) / 2 - whole) > 0.01, "the split is too even to tell"


def with_padding(x, junk: float) -> SimpleNamespace:
    """The same batch with other tokens and ``junk`` for all numbers at masked positions."""

    def fill(name, value):
        where = x.mask.view(*x.mask.shape, *[1] * (value.ndim - 2))
        return value if name == "mask" else torch.where(where, value, junk if value.is_floating_point() else 0)

    return changed(x, fill)


def gradient(loss, x) -> torch.Tensor:
    student = x.student.clone().requires_grad_()
    loss(SimpleNamespace(**{**vars(x), "student": student})).backward()
    return student.grad


@every_loss
@few
@given(x=batches(), junk=st.sampled_from([0.0, 50.0, -50.0, 1e300, math.nan, math.inf, -math.inf]))
def test_what_stands_at_masked_positions_never_matters(loss, x, junk):
    padded = with_padding(x, junk)
    assert loss(padded).item() == loss(x).item()
    assert torch.equal(gradient(loss, padded)[x.mask], gradient(loss, x)[x.mask])
    assert not gradient(loss, padded)[~x.mask].any() or abs(junk) != 50, "padding has a gradient"


# The others are given log-probabilities: their normaliser was computed, and would pass NaN back, before them.
@pytest.mark.parametrize("loss", [LOSSES[name] for name in LOSSES if name not in ("policy", "kdrl", "luffy")])
def test_masked_positions_get_no_gradient_even_where_their_logits_are_infinite(loss):
    x = make_batch(2, 2, mask=[True, True, True, False])
    assert not gradient(loss, with_padding(x, math.inf))[~x.mask].any()


@every_loss
@few
@given(x=batches(), data=st.data())
def test_parts_of_a_batch_with_the_global_normalizer_add_up_to_the_whole(loss, x, data):
    cut = data.draw(st.integers(0, len(x.mask)))
    count = max(1, int(x.mask.sum()))
    parts = [changed(x, lambda _, v, s=s: v[s]) for s in (slice(0, cut), slice(cut, None))]
    halves = [changed(x, lambda n, v, k=k: v & k if n == "mask" else v) for k in (x.tokens < 1, x.tokens >= 1)]
    for split in (parts, halves):
        assert sum(loss(part, count).item() for part in split) == pytest.approx(loss(x).item(), rel=1e-9, abs=1e-12)


@every_loss
@few
@given(x=batches(), data=st.data())
def test_the_order_of_rows_does_not_matter(loss, x, data):
    order = data.draw(st.permutations(range(len(x.mask))))
    assert loss(changed(x, lambda _, v: v[order])).item() == pytest.approx(loss(x).item(), rel=1e-9, abs=1e-12)


@every_loss
@few
@given(x=batches(), own=st.floats(-50, 50), theirs=st.floats(-50, 50))
def test_adding_a_constant_to_all_logits_of_a_position_does_not_matter(loss, x, own, theirs):
    by_position = torch.arange(x.mask.numel()).view(*x.mask.shape, 1)  # another constant at each
    by_name = {"student": own * by_position, "teacher": theirs + by_position, "top_logprobs": theirs - by_position}
    shifted = changed(x, lambda name, v: v + by_name.get(name, 0) if name != "mask" else v)
    assert loss(shifted).item() == pytest.approx(loss(x).item(), rel=1e-7, abs=1e-9)


@few
@given(x=batches())
def test_token_logprobs_pairs_each_token_with_the_logits_of_its_own_position(x):
    for b, t in torch.ones_like(x.mask).nonzero().tolist():
        expected = math.log(probabilities(x.student[b, t])[x.tokens[b, t]])
        assert own(x)[b, t].item() == pytest.approx(expected, abs=1e-9)


@few
@given(st.lists(st.integers(0, 5), min_size=3, max_size=8), st.integers(1, 5), st.sampled_from([-1, 1]))
def test_tokens_shifted_by_one_against_their_logits_lose_their_probability(steps, stride, by):
    tokens = torch.tensor([[(i * stride) % 6 for i in range(len(steps))]])  # neighbours differ
    logits = 30.0 * torch.nn.functional.one_hot(tokens, 6) + torch.tensor(steps).view(1, -1, 1)
    assert losses.token_logprobs(logits, tokens).min() > -1e-5
    assert losses.token_logprobs(logits, tokens.roll(by, dims=1))[:, 1:-1].max() < -29


@few
@given(x=batches(), beta=st.floats(0.01, 0.99))
def test_divergences_are_bounded_and_zero_for_equal_models(x, beta):
    most, one = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta), torch.ones(1, 1)
    for b, t in torch.ones_like(x.mask).nonzero().tolist():
        student, teacher = (v[b : b + 1, t : t + 1] for v in (x.student, x.teacher))
        assert -1e-12 <= losses.generalized_jsd(student, teacher, one, beta).item() <= most + 1e-12
        assert losses.generalized_jsd(student, student + 2, one, beta).item() == pytest.approx(0, abs=1e-12)
        for kl_per_token in (losses.reverse_kl_per_token, losses.forward_kl_per_token):
            assert kl_per_token(student, teacher).item() >= -1e-12
            assert kl_per_token(student, student + 2).item() == pytest.approx(0, abs=1e-12)
    apart = 500 * torch.eye(2, dtype=torch.float64)[:, None]  # nothing in common: the bound is reached
    assert losses.generalized_jsd(apart[:1], apart[1:], one, beta).item() == pytest.approx(most)


@few
@given(x=batches())
def test_entropy_lies_between_zero_and_log_v_and_k2_and_k3_are_never_negative(x):
    assert losses.entropy(x.student).min() >= -1e-12
    assert losses.entropy(x.student).max() <= math.log(x.student.shape[-1]) + 1e-12
    theirs = losses.token_logprobs(x.teacher, x.tokens)
    assert min(losses.sampled_kl(own(x), theirs, k).min() for k in ("k2", "k3")) >= -1e-12


@few
@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, -1.0]), min_size=4, max_size=4), min_size=1, max_size=5),
    st.sampled_from([(3.0, 0.0), (1.0, -2.0), (0.5, 10.0)]),
    st.booleans(),
)
def test_group_advantages_look_at_their_own_group_only_average_to_zero_and_ignore_the_scale(rewards, line, normalize):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    found = losses.group_advantages(rewards.flatten(), 4, normalize).view(-1, 4)
    alone = torch.stack([losses.group_advantages(group, 4, normalize) for group in rewards])
    assert torch.allclose(found, alone, rtol=0, atol=1e-12)
    assert found.mean(-1).tolist() == pytest.approx([0] * len(rewards), abs=1e-12)
    scaled = losses.group_advantages((rewards * line[0] + line[1]).flatten(), 4, normalize).view(-1, 4)
    assert torch.allclose(scaled, found * (1 if normalize else line[0]), atol=1e-9)
    if normalize:
        assert all(s == pytest.approx(1) or s == 0 for s in found.std(-1).tolist())


@few
@given(x=batches())
def test_top_k_guidance_is_guidance_for_k_1_and_forward_kl_plus_the_teachers_entropy_for_k_v(x):
    top_1 = losses.top_k_guidance_loss(x.student, x.top_tokens[..., :1], x.top_logprobs[..., :1], x.mask)
    assert top_1.item() == pytest.approx(LOSSES["guidance"](x).item(), rel=1e-9)
    assert not x.mask.any() or top_1 > 0
    logprobs, tokens = x.teacher.log_softmax(-1).sort(descending=True)
    full = losses.top_k_guidance_loss(x.student, tokens, logprobs, x.mask)
    teacher_entropy = losses.masked_sum(losses.entropy(x.teacher), x.mask)
    assert full.item() == pytest.approx((LOSSES["forward_kl"](x) + teacher_entropy).item(), rel=1e-9)
