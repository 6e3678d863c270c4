"""What one step of each method would add to the logits of a position.

An update is −∂L/∂z at one position, where z are the logits whose softmax is the policy (the student's logits divided by
the temperature) and L is the method's loss with a normaliser of 1: what a gradient step of size 1 on the logits
themselves would add to them, before the division by the tokens of a batch. With e_v the unit vector of token v,
d_t = log πθ(y_t) − log πT(y_t), A the group advantage, w the weight and g_t the gate of guidance:

    rkl         −d_t·(e_{y_t} − πθ)
    exact-rkl   −πθ(v)·(log πθ(v) − log πT(v) − KL(πθ‖πT)) at each v
    grpo        A·(e_{y_t} − πθ)
    tgpo        A·(e_{y_t} − πθ) + w·g_t·(e_{y_t^T} − πθ)

They come out of the losses that train, by automatic differentiation; the formulas are what to expect.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses import guidance_loss, policy_gradient_loss, reverse_kl, reverse_kl_advantage, token_logprobs
from ..models.policy import most_probable

UPDATE_METHODS = ("rkl", "exact-rkl", "grpo", "tgpo")


def logit_updates(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    guidance_weights: Tensor,
    teacher_tokens: Tensor | None = None,
) -> dict[str, Tensor]:
    """What one step of each method adds to the logits of N positions, see the head of this file.

    Args:
        student_logits: (N, V) of the policy, already divided by the temperature.
        teacher_logits: (N, V).
        tokens: (N,) int64, what was written.
        advantages: (N,) group advantage of the response that each position is of.
        guidance_weights: (N,) w·g_t.
        teacher_tokens: (N,) int64, what the teacher would write; by default its most probable token.

    Returns:
        A name of :data:`UPDATE_METHODS` → (N, V).
    """
    if teacher_tokens is None:
        teacher_tokens = most_probable(teacher_logits)
    with torch.enable_grad():
        logits = student_logits.detach().unsqueeze(0).requires_grad_()  # (1, N, V): losses take rows of positions
        teacher = teacher_logits.detach().unsqueeze(0)
        tokens, teacher_tokens = tokens.unsqueeze(0), teacher_tokens.unsqueeze(0)
        mask = torch.ones_like(tokens, dtype=torch.bool)

        def policy_gradient(rewards: Tensor) -> Tensor:
            logprobs = token_logprobs(logits, tokens)
            return policy_gradient_loss(logprobs, logprobs.detach(), rewards, mask, normalizer=1)

        def group_reward() -> Tensor:
            return policy_gradient(advantages.unsqueeze(0))

        losses = {
            "rkl": lambda: policy_gradient(
                reverse_kl_advantage(token_logprobs(logits, tokens), token_logprobs(teacher, tokens))
            ),
            "exact-rkl": lambda: reverse_kl(logits, teacher, mask, normalizer=1),
            "grpo": group_reward,
            "tgpo": lambda: (
                group_reward() + guidance_loss(logits, teacher_tokens, mask, 1, guidance_weights.unsqueeze(0))
            ),
        }
        # One method after the other: a whole-vocabulary gradient of each is alive only while it is needed.
        return {name: -torch.autograd.grad(loss(), logits)[0].squeeze(0) for name, loss in losses.items()}
