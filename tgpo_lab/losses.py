"""Losses of on-policy distillation as pure tensor functions. They never see a model.

Letters for shapes, here and in the whole package:

    B  rows: prompts × group size       T  response positions, padded on the right
    V  vocabulary                       G  group size: samples for one prompt
    K  tokens of a top-k list           H  hidden width of a model
    P  prompt positions                 N  response positions of a micro-batch, without padding

Logits are (B, T, V) and already aligned: ``logits[b, t]`` predicts ``tokens[b, t]``. Tokens,
log-probabilities, advantages and masks are (B, T); a mask is True (or 1) where a position counts.
``normalizer`` is the number the masked sum is divided by; by default the number of unmasked
positions of this call. A loop that splits a batch passes the number of the WHOLE batch to every
part: then the parts add up to the loss of the batch. All losses are scalars in nats per normaliser
unit, to be minimised. No gradient flows to the teacher.

Notation of the equations: πθ student, π_old student when it sampled, πT teacher, y_t the sampled token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .token_distributions import entropy, forward_kl_per_token, reverse_kl_per_token, token_logprobs

__all__ = [
    "entropy",
    "forward_kl",
    "forward_kl_per_token",
    "generalized_jsd",
    "group_advantages",
    "guidance_loss",
    "kdrl_loss",
    "luffy_off_policy_loss",
    "masked_sum",
    "negative_log_likelihood",
    "policy_gradient_loss",
    "reverse_kl",
    "reverse_kl_advantage",
    "reverse_kl_per_token",
    "sampled_kl",
    "token_logprobs",
    "top_k_guidance_loss",
]


def masked_sum(values: Tensor, mask: Tensor, normalizer: float | Tensor | None = None) -> Tensor:
    """Sum of ``values`` (B, T) where ``mask`` (B, T), divided by ``normalizer``.

    Masked positions are selected away, not multiplied by zero, so an infinite value there does not
    reach the sum. A mask without any position gives 0.

    Raises:
        ValueError: shapes differ, or the normaliser is not positive.
    """
    if values.shape != mask.shape:
        raise ValueError(f"values and mask must have one shape, but are {tuple(values.shape)} and {tuple(mask.shape)}.")
    mask = mask.bool()
    if normalizer is None:
        normalizer = mask.sum().clamp(min=1)
    elif normalizer <= 0:
        raise ValueError(f"normalizer must be positive, but is {normalizer}.")
    return torch.where(mask, values, 0.0).sum() / normalizer


def _visible(values: Tensor, mask: Tensor) -> Tensor:
    """Zeros at masked positions of (B, T) or (B, T, V): selecting later would still give NaN gradients there."""
    if values.shape[:2] != mask.shape:
        raise ValueError(f"A tensor of shape {tuple(values.shape)} does not fit a mask of shape {tuple(mask.shape)}.")
    mask = mask.bool()
    if bool(mask.all()):
        return values
    return torch.where(mask if values.ndim == 2 else mask.unsqueeze(-1), values, values.new_zeros(()))


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, normalizer: float | None = None) -> Tensor:
    """Exact reverse KL per position, KL(πθ‖πT), differentiated directly (GKD with β = 1).

    It ignores how a token changes the states that come after it: the gradient is that of the
    per-position divergence on fixed prefixes, not of the divergence of whole responses.
    """
    student, teacher = _visible(student_logits, mask), _visible(teacher_logits, mask)
    return masked_sum(reverse_kl_per_token(student, teacher), mask, normalizer)


def forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    normalizer: float | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Exact forward KL per position, KL(πT‖πθ), on the prefixes given (GKD with β = 0).

    ``weights`` as in :func:`guidance_loss`.
    """
    student, teacher = _visible(student_logits, mask), _visible(teacher_logits, mask)
    return masked_sum(_weighted(forward_kl_per_token(student, teacher), weights, mask), mask, normalizer)


def generalized_jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    beta: float = 0.5,
    normalizer: float | None = None,
) -> Tensor:
    """Generalised Jensen–Shannon divergence of GKD (Agarwal et al. 2024, arXiv 2306.13649).

    JSD(β) = β·KL(πT‖M) + (1−β)·KL(πθ‖M) with M = β·πT + (1−β)·πθ, per position.
    β = 0 gives the forward KL and β = 1 the reverse KL, the limits of JSD(β)/β and JSD(β)/(1−β);
    so the scale jumps at both ends, as in the paper and in TRL.

    Raises:
        ValueError: β is outside [0, 1].
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be from 0 (forward KL) to 1 (reverse KL), but is {beta}.")
    if beta == 0:
        return forward_kl(student_logits, teacher_logits, mask, normalizer)
    if beta == 1:
        return reverse_kl(student_logits, teacher_logits, mask, normalizer)
    student = _visible(student_logits, mask).log_softmax(-1)
    teacher = _visible(teacher_logits, mask).detach().log_softmax(-1)
    weights = torch.tensor([beta, 1 - beta], dtype=student.dtype, device=student.device).log()
    mixture = torch.logaddexp(teacher + weights[0], student + weights[1])  # (B, T, V)
    to_teacher = (teacher.exp() * (teacher - mixture)).sum(-1)
    to_student = (student.exp() * (student - mixture)).sum(-1)
    return masked_sum(beta * to_teacher + (1 - beta) * to_student, mask, normalizer)


def sampled_kl(student_logprobs: Tensor, teacher_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """Estimates of KL(πθ‖πT) from the sampled tokens alone, (B, T) twice → (B, T).

    With d = log πθ(y_t) − log πT(y_t): k1 = d, k2 = d²/2, k3 = e^−d − 1 + d (Schulman 2020). To
    MEASURE, take k1 or k3 (unbiased). To DIFFERENTIATE, beware: the gradient of k1 is zero in
    expectation, that of k2 is the gradient of the reverse KL, that of k3 of the forward KL.

    Raises:
        ValueError: unknown estimator.
    """
    difference = student_logprobs - teacher_logprobs.detach()
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "k3":
        return (-difference).exp() - 1 + difference
    raise ValueError(f"Unknown estimator {estimator!r}: choose k1, k2 or k3.")


def reverse_kl_advantage(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Per-token reward of reverse KL as policy gradient: log πT(y_t) − log πθ(y_t), detached; (B, T)."""
    return -sampled_kl(student_logprobs, teacher_logprobs, "k1").detach()


def group_advantages(rewards: Tensor, group_size: int, normalize_std: bool = True) -> Tensor:
    """Advantage of each sample against its own group: (r − mean) / std, (B,) → (B,).

    Rows of one prompt stand together: rows 0…G−1 are the first group. The standard deviation has
    G − 1 in its denominator, as in TRL and verl. A group with equal rewards gets zeros.

    Raises:
        ValueError: B is not a multiple of the group size, or the group size is below 2.
    """
    if group_size < 2:
        raise ValueError(
            f"Group advantages compare samples of one prompt: group_size must be ≥ 2, but is {group_size}."
        )
    if rewards.ndim != 1 or rewards.numel() % group_size:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)} cannot be split into groups of {group_size}.")
    groups = rewards.to(torch.get_default_dtype() if not rewards.is_floating_point() else rewards.dtype)
    groups = groups.view(-1, group_size)
    centred = groups - groups.mean(-1, keepdim=True)
    if normalize_std:
        # Equal rewards are told by comparing them: their computed deviation is rounding noise, not zero.
        uniform = torch.isclose(groups, groups[:, :1], rtol=1e-6, atol=0.0).all(-1, keepdim=True)
        centred = torch.where(uniform, 0.0, centred / groups.std(-1, keepdim=True).where(~uniform, 1.0))
    return centred.flatten()


def policy_gradient_loss(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    normalizer: float | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Clipped surrogate of PPO: −min(ρ·A, clip(ρ, 1 − clip_low, 1 + clip_high)·A), ρ = πθ(y_t)/π_old(y_t).

    Infinite clips give the plain importance-weighted policy gradient. All arguments (B, T); ``weights``
    as in :func:`guidance_loss`, for instance those of :mod:`tgpo_lab.importance`.
    """
    ratio = (_visible(logprobs, mask) - _visible(behaviour_logprobs, mask).detach()).exp()
    advantages = _visible(advantages, mask).detach()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    return -masked_sum(_weighted(surrogate, weights, mask), mask, normalizer)


def guidance_loss(
    student_logits: Tensor,
    teacher_tokens: Tensor,
    mask: Tensor,
    normalizer: float | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Teacher guidance of TGPO: −Σ_t log πθ(y_t^T | x, y_<t) with y_t^T the teacher's token at the
    student's own prefix; (B, T, V) and (B, T).

    ``weights`` (B, T) are multiplied into each position's term. The normaliser stays the number of
    unmasked positions, so a weight below 1 takes guidance away there and makes no other token heavier.
    """
    student, teacher_tokens = _visible(student_logits, mask), _visible(teacher_tokens, mask)
    return negative_log_likelihood(token_logprobs(student, teacher_tokens), mask, normalizer, weights)


def negative_log_likelihood(
    logprobs: Tensor,
    mask: Tensor,
    normalizer: float | Tensor | None = None,
    weights: Tensor | None = None,
    teacher_logprobs: Tensor | None = None,
) -> Tensor:
    """−Σ_t log πθ of tokens whose log-probabilities (B, T) are known; ``weights`` as in :func:`guidance_loss`. With
    ``teacher_logprobs`` the sum of :func:`top_k_guidance_loss`, both then (B, T, K)."""
    logprobs = _visible(logprobs, mask)
    if teacher_logprobs is not None:
        logprobs = (_visible(teacher_logprobs, mask).detach().softmax(-1) * logprobs).sum(-1)
    return masked_sum(_weighted(-logprobs, weights, mask), mask, normalizer)


def _weighted(values: Tensor, weights: Tensor | None, mask: Tensor) -> Tensor:
    """``values`` (B, T) times ``weights`` (B, T), to which no gradient flows."""
    return values if weights is None else values * _visible(weights, mask).detach()


def top_k_guidance_loss(
    student_logits: Tensor,
    teacher_tokens: Tensor,
    teacher_logprobs: Tensor,
    mask: Tensor,
    normalizer: float | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Guidance by the teacher's K best tokens: −Σ_t Σ_k p̃_k log πθ(token_k), p̃ renormalised over the K.

    A cross-entropy against the student's FULL distribution: the tokens outside the list keep their
    place in the student's normaliser, so emptying the list is never rewarded (the fault of a top-k
    reverse KL without a tail). K = 1 is :func:`guidance_loss`, whose ``weights`` these are too.
    Teacher tensors are (B, T, K).
    """
    student_logits, teacher_tokens = _visible(student_logits, mask), _visible(teacher_tokens, mask)
    student = token_logprobs(student_logits, teacher_tokens)  # (B, T, K)
    return negative_log_likelihood(student, mask, normalizer, weights, teacher_logprobs)


def kdrl_loss(
    logprobs: Tensor,
    teacher_logprobs: Tensor,
    mask: Tensor,
    normalizer: float | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Distillation term of KDRL: ½(log πθ(y_t) − log πT(y_t))², the k2 estimator, differentiated directly.

    Its expected gradient over y_t ~ πθ is that of the reverse KL. (Two public implementations
    differentiate k1 instead, whose expected gradient is zero.) ``weights`` as in :func:`policy_gradient_loss`.
    """
    difference = sampled_kl(_visible(logprobs, mask), _visible(teacher_logprobs, mask), "k2")
    return masked_sum(_weighted(difference, weights, mask), mask, normalizer)


def luffy_off_policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    gamma: float = 0.1,
    normalizer: float | None = None,
) -> Tensor:
    """Loss of LUFFY on a teacher's trace: −A·p/(p + γ) with p = πθ(y_t) (policy shaping, arXiv 2504.14945).

    The shaped ratio lifts the gradient of improbable tokens, which plain p would starve.

    Raises:
        ValueError: γ is not positive.
    """
    if gamma <= 0:
        raise ValueError(f"gamma must be positive, but is {gamma}.")
    probability = _visible(logprobs, mask).exp()
    return -masked_sum(_visible(advantages, mask).detach() * probability / (probability + gamma), mask, normalizer)
