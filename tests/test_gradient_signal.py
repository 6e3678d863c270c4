"""Moments of the teacher's signal against autograd, token by token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tgpo_lab import losses
from tgpo_lab.diagnostics.gradient_signal import signal_moments

SEEDS = st.integers(0, 10_000)


def draw(seed, vocabulary=6, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(1, vocabulary, generator=generator, dtype=torch.float64) for _ in range(2))


@given(SEEDS)
def test_moments_equal_those_of_the_gradients_of_the_losses(seed):
    student, teacher = draw(seed)
    policy = student.softmax(-1)[0]
    mask = torch.ones(1, 1)
    gradients = []
    for token in range(student.shape[1]):  # every token that could be drawn
        logits = student.clone().unsqueeze(0).requires_grad_()
        tokens = torch.tensor([[token]])
        own = losses.token_logprobs(logits, tokens)
        advantage = losses.reverse_kl_advantage(own, losses.token_logprobs(teacher.unsqueeze(0), tokens))
        losses.policy_gradient_loss(own, own.detach(), advantage, mask).backward()
        gradients.append(logits.grad.flatten())
    gradients = torch.stack(gradients)  # (V, V): gradient if that token is drawn
    second = (policy * gradients.square().sum(-1)).sum()
    mean = (policy.unsqueeze(-1) * gradients).sum(0)

    found = {name: float(value) for name, value in signal_moments(student, teacher).items()}
    assert found["policy_gradient_second_moment"] == pytest.approx(float(second), rel=1e-9)
    assert found["exact_squared_norm"] == pytest.approx(float(mean.square().sum()), rel=1e-9, abs=1e-12)
    assert found["policy_gradient_variance"] == pytest.approx(float(second - mean.square().sum()), rel=1e-6, abs=1e-9)

    for name, loss in {
        "exact_squared_norm": lambda x: losses.reverse_kl(x, teacher.unsqueeze(0), mask),
        "guidance_squared_norm": lambda x: losses.guidance_loss(x, teacher.argmax(-1, keepdim=True), mask),
    }.items():
        logits = student.clone().unsqueeze(0).requires_grad_()
        loss(logits).backward()
        assert found[name] == pytest.approx(float(logits.grad.square().sum()), rel=1e-9, abs=1e-12)
    assert found["guidance_squared_norm"] <= 2


def test_the_rejection_regime_by_hand():
    # The student gives token 0 nearly everything, the teacher e^−10 of it: |r| ≥ log(δ/ε).
    student, teacher = torch.tensor([[10.0, 0.0, 0.0]]), torch.tensor([[0.0, 10.0, 0.0]])
    found = signal_moments(student, teacher)
    assert float(found["largest_rejection"]) == pytest.approx(10.0, abs=1e-3)
    assert float(found["rejected"]) == pytest.approx(float(student.softmax(-1)[0, 0]), abs=1e-6)
    assert float(signal_moments(student, teacher, threshold=11)["rejected"]) == 0


@pytest.mark.parametrize("gap", [5.0, 10.0, 20.0])
def test_the_second_moment_grows_without_bound_where_guidance_does_not(gap):
    student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[-gap, gap]])
    found = signal_moments(student, teacher)
    assert float(found["policy_gradient_second_moment"]) > gap**2 / 4
    assert float(found["guidance_squared_norm"]) <= 2


def test_equal_models_give_no_reverse_kl_signal():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    found = signal_moments(logits, logits)
    for name in ("policy_gradient_second_moment", "policy_gradient_variance", "exact_squared_norm", "rejected"):
        assert found[name].abs().max() < 1e-10
