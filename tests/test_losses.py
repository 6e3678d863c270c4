"""Values of the losses against numbers worked by hand (against slow references: test_loss_properties.py)."""

import math

import pytest
import torch

from tgpo_lab import losses

LOG2, LOG3 = math.log(2), math.log(3)
ONE = torch.ones(1, 1)


def doubles(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def logits_of(*probabilities: float, shift: float = 1.7) -> torch.Tensor:
    """Logits (1, 1, V) of one distribution, not normalised, so that a missing softmax shows."""
    return doubles([[[math.log(p) + shift for p in probabilities]]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masked_sum_by_hand_for_every_kind_of_mask(dtype):
    values = doubles([[1, 2, math.nan], [4, math.inf, -math.inf]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).to(dtype)
    assert losses.masked_sum(values, mask).item() == pytest.approx(7 / 3)
    assert losses.masked_sum(values, mask, 14).item() == pytest.approx(0.5)
    assert losses.masked_sum(values, mask, torch.tensor(3.5)).item() == pytest.approx(2.0)
    assert losses.masked_sum(values, mask * 0).item() == 0


@pytest.mark.parametrize("normalizer", [0, -1.0, torch.tensor(0)])
def test_a_normalizer_that_is_not_positive_is_refused(normalizer):
    with pytest.raises(ValueError, match="normalizer must be positive"):
        losses.masked_sum(torch.ones(1, 2), torch.ones(1, 2), normalizer)


@pytest.mark.parametrize("shape", [(3, 2), (3,), (2, 1), (2, 3, 1)])
def test_a_mask_of_another_shape_is_refused_and_not_broadcast(shape):
    with pytest.raises(ValueError, match=r"one shape, but are \(2, 3\)"):
        losses.masked_sum(torch.ones(2, 3), torch.ones(shape))


def test_guidance_refuses_a_transposed_mask():
    with pytest.raises(ValueError):
        losses.guidance_loss(torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long), torch.ones(3, 2))


def test_token_logprobs_by_hand():
    logits = torch.cat([logits_of(0.5, 0.25, 0.25), logits_of(0.125, 0.125, 0.75, shift=-3)], dim=1)
    found = losses.token_logprobs(logits, torch.tensor([[1, 2]]))
    assert found.tolist() == [pytest.approx([-2 * LOG2, LOG3 - 2 * LOG2], rel=1e-12)]


def test_extreme_logits_stay_finite_in_single_precision():
    logits, best, worst = torch.tensor([[[1e4, -1e4, 0.0]]]), torch.tensor([[0]]), torch.tensor([[1]])
    assert losses.token_logprobs(logits, worst).item() == -2e4
    assert losses.token_logprobs(logits, best).item() == 0
    assert losses.entropy(logits).item() == 0
    assert losses.reverse_kl(logits, -logits, ONE).item() == 2e4
    assert losses.forward_kl(logits, -logits, ONE).item() == 2e4
    assert losses.generalized_jsd(logits, -logits, ONE).item() == pytest.approx(LOG2)
    assert losses.guidance_loss(logits, worst, ONE).item() == 2e4
    assert losses.luffy_off_policy_loss(losses.token_logprobs(logits, worst), ONE, ONE).item() == 0


def test_entropy_of_the_uniform_distribution_is_log_v_and_of_one_half_and_two_quarters_three_halves_log_2():
    for vocabulary in (1, 2, 5, 1000):
        uniform = losses.entropy(torch.full((2, 3, vocabulary), -4.2)).tolist()
        assert uniform == [pytest.approx([math.log(vocabulary)] * 3, abs=1e-5)] * 2
    assert losses.entropy(logits_of(0.5, 0.25, 0.25)).item() == pytest.approx(1.5 * LOG2, rel=1e-12)


STUDENT, TEACHER = logits_of(1 / 2, 1 / 4, 1 / 4), logits_of(1 / 8, 1 / 8, 3 / 4, shift=-0.6)
# KL(πθ‖πT) = ½·log 4 + ¼·log 2 + ¼·log(1/3)      KL(πT‖πθ) = ⅛·log(1/4) + ⅛·log(1/2) + ¾·log 3
REVERSE, FORWARD = 1.25 * LOG2 - 0.25 * LOG3, 0.75 * LOG3 - 0.375 * LOG2


def jsd_of(beta: float, student=STUDENT, teacher=TEACHER, normalizer=None) -> float:
    return losses.generalized_jsd(student, teacher, ONE, beta, normalizer).item()


def test_reverse_and_forward_kl_by_hand_are_not_swapped():
    assert losses.reverse_kl(STUDENT, TEACHER, ONE).item() == pytest.approx(REVERSE, rel=1e-12)
    assert losses.forward_kl(STUDENT, TEACHER, ONE).item() == pytest.approx(FORWARD, rel=1e-12)
    assert losses.reverse_kl_per_token(STUDENT, TEACHER).tolist() == [[pytest.approx(REVERSE, rel=1e-12)]]
    assert losses.forward_kl_per_token(STUDENT, TEACHER).tolist() == [[pytest.approx(FORWARD, rel=1e-12)]]


def test_generalized_jsd_by_hand():  # β = ¼: M = ¼·(1/8, 1/8, 3/4) + ¾·(1/2, 1/4, 1/4) = (13, 7, 12)/32
    to_teacher = (math.log(4 / 13) + math.log(4 / 7)) / 8 + 0.75 * math.log(2)
    to_student = math.log(16 / 13) / 2 + (math.log(8 / 7) + math.log(2 / 3)) / 4
    assert jsd_of(0.25) == pytest.approx(0.25 * to_teacher + 0.75 * to_student, rel=1e-12)


def test_generalized_jsd_is_forward_kl_at_zero_and_reverse_kl_at_one_and_scaled_approaches_them():
    for normalizer in (1, 4):
        assert jsd_of(0, normalizer=normalizer) == pytest.approx(FORWARD / normalizer, rel=1e-12)
        assert jsd_of(1, normalizer=normalizer) == pytest.approx(REVERSE / normalizer, rel=1e-12)
    assert jsd_of(1e-6) / 1e-6 == pytest.approx(FORWARD, rel=1e-4)
    assert jsd_of(1 - 1e-6) / 1e-6 == pytest.approx(REVERSE, rel=1e-4)


def test_generalized_jsd_is_symmetric_at_one_half_only_and_that_is_the_default():
    assert jsd_of(0.5) == pytest.approx(jsd_of(0.5, TEACHER, STUDENT), rel=1e-12)
    assert abs(jsd_of(0.2) - jsd_of(0.2, TEACHER, STUDENT)) > 1e-3
    assert losses.generalized_jsd(STUDENT, TEACHER, ONE).item() == jsd_of(0.5)


@pytest.mark.parametrize("beta", [-0.01, 1.01, math.nan])
def test_generalized_jsd_refuses_a_beta_outside_zero_to_one(beta):
    with pytest.raises(ValueError, match="beta must be from 0"):
        jsd_of(beta)


def test_sampled_estimators_by_hand():  # πθ = ½, πT = ¼: d = log 2, e^−d = ½
    student, teacher = doubles([[-LOG2]]), doubles([[-2 * LOG2]])
    assert losses.sampled_kl(student, teacher).item() == pytest.approx(LOG2)
    assert losses.sampled_kl(student, teacher, "k1").item() == pytest.approx(LOG2)
    assert losses.sampled_kl(student, teacher, "k2").item() == pytest.approx(LOG2**2 / 2)
    assert losses.sampled_kl(student, teacher, "k3").item() == pytest.approx(0.5 - 1 + LOG2)
    with pytest.raises(ValueError, match=r"'k4'.*k1, k2 or k3"):
        losses.sampled_kl(student, teacher, "k4")


def test_k1_and_k3_measure_the_reverse_kl_without_bias_and_k2_does_not():
    p, tokens = doubles([1 / 2, 1 / 4, 1 / 4]), torch.tensor([[0, 1, 2]])
    student, teacher = (losses.token_logprobs(x.expand(1, 3, 3), tokens) for x in (STUDENT, TEACHER))
    mean = {k: (p * losses.sampled_kl(student, teacher, k)).sum().item() for k in ("k1", "k2", "k3")}
    assert (mean["k1"], mean["k3"]) == pytest.approx((REVERSE, REVERSE), rel=1e-12)
    assert abs(mean["k2"] - REVERSE) > 0.05


def test_reverse_kl_advantage_is_positive_where_the_teacher_likes_the_token_more_and_detached():
    advantage = losses.reverse_kl_advantage(doubles([[-LOG2, -LOG3]]).requires_grad_(), doubles([[-LOG3, -LOG2]]))
    assert advantage.tolist() == [pytest.approx([LOG2 - LOG3, LOG3 - LOG2])]
    assert not advantage.requires_grad


def test_group_advantages_by_hand():
    # Group (1, 0, 0, 0): mean ¼, squares ¾² + 3·¼² = ¾, variance ¾/3, std ½. Group (2, 4, 6, 8): mean 5, std √(20/3).
    rewards, s = torch.tensor([1.0, 0, 0, 0, 2, 4, 6, 8]), math.sqrt(20 / 3)
    expected = [1.5, -0.5, -0.5, -0.5, -3 / s, -1 / s, 1 / s, 3 / s]
    assert losses.group_advantages(rewards, 4).tolist() == pytest.approx(expected, rel=1e-6)
    centred = losses.group_advantages(rewards, 4, normalize_std=False).tolist()
    assert centred == pytest.approx([0.75, -0.25, -0.25, -0.25, -3, -1, 1, 3])
    root = math.sqrt(0.5)
    assert losses.group_advantages(torch.tensor([1, 0, 0, 1]), 2).tolist() == pytest.approx([root, -root, -root, root])


@pytest.mark.parametrize("normalize_std", [True, False])
def test_a_group_with_equal_rewards_gets_zeros_beside_one_that_does_not(normalize_std):
    advantages = losses.group_advantages(torch.tensor([1.0, 1, 1, 0, 1, 0]), 3, normalize_std)
    assert advantages[:3].tolist() == [0, 0, 0]
    assert advantages[3:].abs().min() > 0.3


def test_float_noise_between_equal_rewards_is_not_blown_up_but_a_small_difference_counts():
    noisy = doubles([0.3, 0.1 + 0.2] * 2)  # 0.30000000000000004
    assert noisy.std() > 0
    assert losses.group_advantages(noisy, 4).tolist() == [0] * 4
    for size in range(2, 33):  # the mean of equal float32 numbers may miss them by a bit
        assert losses.group_advantages(torch.full((size,), 0.1), size).abs().max() < 1e-6
    small = losses.group_advantages(doubles([0.5, 0.501]), 2).tolist()
    assert small == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])


def test_equal_rewards_of_any_size_get_zeros():
    for size in range(2, 17):
        for reward in (10.1, 100.1, 1000.1):
            assert losses.group_advantages(torch.full((size,), reward), size).abs().max() < 1e-3


@pytest.mark.parametrize("shape, size, message", [((6,), 4, "groups of 4"), ((2, 2), 2, "split"), ((4,), 1, "must be")])
def test_rewards_that_do_not_form_groups_are_refused(shape, size, message):
    with pytest.raises(ValueError, match=message):
        losses.group_advantages(torch.zeros(shape), size)


def test_guidance_and_top_k_guidance_by_hand():
    loss = losses.guidance_loss(STUDENT.expand(1, 2, 3), torch.tensor([[1, 0]]), torch.ones(1, 2))
    assert loss.item() == pytest.approx((2 * LOG2 + LOG2) / 2, rel=1e-12)
    # Teacher ⅛ and ⅜ on tokens 2 and 0, renormalised ¼ and ¾; student ⅛ and ½ there: ¼·log 8 + ¾·log 2.
    student, listed = logits_of(1 / 2, 1 / 4, 1 / 8, 1 / 8), torch.tensor([[[2, 0]]])
    loss = losses.top_k_guidance_loss(student, listed, doubles([[[1 / 8, 3 / 8]]]).log(), ONE)
    assert loss.item() == pytest.approx(1.5 * LOG2, rel=1e-12)


def test_weights_of_guidance_by_hand():
    # Cross-entropies log 4 and log 2, divided by the two positions whatever their weights are.
    student, best, mask = STUDENT.expand(1, 2, 3).clone().requires_grad_(), torch.tensor([[1, 0]]), torch.ones(1, 2)
    loss = losses.guidance_loss(student, best, mask, weights=doubles([[0.25, 0.5]]))
    assert loss.item() == pytest.approx((0.25 * 2 * LOG2 + 0.5 * LOG2) / 2, rel=1e-12)
    loss.backward()  # w·(πθ − one at the teacher's token)/2
    rows = [[0.0625, -0.09375, 0.03125], [-0.125, 0.0625, 0.0625]]
    assert student.grad.tolist() == [[pytest.approx(row, rel=1e-12) for row in rows]]
    loss = losses.guidance_loss(student, best, mask, 8, doubles([[0.25, 0.5]]))
    assert loss.item() == pytest.approx(LOG2 / 8, rel=1e-12)
    # Top-k as above: 1.5·log 2. Forward KL as above. Both at a weight of ¼.
    listed, quarter = torch.tensor([[[2, 0]]]), doubles([[0.25]])
    four = logits_of(1 / 2, 1 / 4, 1 / 8, 1 / 8)
    loss = losses.top_k_guidance_loss(four, listed, doubles([[[1 / 8, 3 / 8]]]).log(), ONE, weights=quarter)
    assert loss.item() == pytest.approx(0.375 * LOG2, rel=1e-12)
    assert losses.forward_kl(STUDENT, TEACHER, ONE, weights=quarter).item() == pytest.approx(FORWARD / 4, rel=1e-12)


@pytest.mark.parametrize("shape", [(2, 1), (3, 2), (3,), (2, 3, 5)])
def test_weights_of_another_shape_are_refused_and_not_broadcast(shape):
    logits, tokens, mask = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3)
    with pytest.raises((ValueError, RuntimeError)):
        losses.guidance_loss(logits, tokens, mask, weights=torch.ones(shape))


def test_no_gradient_reaches_the_weights():
    weights = torch.full((1, 1), 0.5, dtype=torch.float64, requires_grad=True)
    student = STUDENT.clone().requires_grad_()
    losses.guidance_loss(student, torch.tensor([[1]]), ONE, weights=weights).backward()
    assert weights.grad is None and student.grad.any()


def test_emptying_the_students_top_k_mass_is_not_rewarded():
    listed, teacher = torch.tensor([[[0, 1]]]), doubles([[[0.6, 0.3]]]).log()

    def loss(mass):  # the student keeps the right proportions inside the list
        student = logits_of(mass * 2 / 3, mass / 3, (1 - mass) / 2, (1 - mass) / 2)
        return losses.top_k_guidance_loss(student, listed, teacher, ONE).item()

    by_mass = [loss(mass) for mass in (0.999, 0.9, 0.5, 0.1, 1e-3, 1e-9)]
    assert by_mass == sorted(by_mass)
    assert by_mass[-1] > by_mass[0] + 20  # log 1e9 = 20.7


@pytest.mark.parametrize("gamma", [0, -0.1])
def test_luffy_refuses_a_gamma_that_is_not_positive(gamma):
    with pytest.raises(ValueError, match="gamma must be positive"):
        losses.luffy_off_policy_loss(ONE, ONE, ONE, gamma)
