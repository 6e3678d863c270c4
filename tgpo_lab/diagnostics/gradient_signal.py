"""How strong and how noisy the teacher's signal is, position by position, by enumeration over the vocabulary.

All in the space of a position's logits, where the gradient of log π(v) is e_v − π. With r_v = log πT(v) − log πθ(v):

    reverse KL as policy gradient   r_v·(e_v − π) for a token v drawn from πθ: second moment and variance over v
    exact reverse KL                its mean, Σ_v πθ(v)·r_v·(e_v − π): no variance
    guidance                        e_{y^T} − π for the teacher's most probable token: no variance, norm below √2

A token that the student gives at least δ and the teacher at most ε has |r_v| ≥ log(δ/ε), without bound as ε falls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses import reverse_kl_per_token


def signal_moments(student_logits: Tensor, teacher_logits: Tensor, threshold: float = 4.0) -> dict[str, Tensor]:
    """Moments of the gradient that one position gives, in nats²: (N, V) twice → (N,) each.

    Args:
        student_logits: of πθ.
        teacher_logits: of πT.
        threshold: nats by which log πθ(v) must exceed log πT(v) for a token to count as rejected.

    Returns:
        ``policy_gradient_second_moment``, ``policy_gradient_variance`` and ``exact_squared_norm`` of reverse KL,
        ``guidance_squared_norm``; ``rejected``, the probability that the student draws a rejected token;
        ``largest_rejection``, the largest −r_v of a token that the student gives at least 0.01 (nats, 0 for none); and
        ``reverse_kl`` (nats).
    """
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    policy = student.exp()
    reward = teacher - student  # r_v
    collision = policy.square().sum(-1)  # Σ_v π(v)²
    score_norm = 1 - 2 * policy + collision.unsqueeze(-1)  # ‖e_v − π‖²
    second_moment = (policy * reward.square() * score_norm).sum(-1)
    mean_reward = (policy * reward).sum(-1, keepdim=True)
    exact = (policy * (reward - mean_reward)).square().sum(-1)
    best = teacher.argmax(-1, keepdim=True)
    return {
        "policy_gradient_second_moment": second_moment,
        "policy_gradient_variance": (second_moment - exact).clamp(min=0),
        "exact_squared_norm": exact,
        "guidance_squared_norm": 1 - 2 * policy.gather(-1, best).squeeze(-1) + collision,
        "rejected": (policy * (reward < -threshold)).sum(-1),
        "largest_rejection": torch.where(policy >= 0.01, -reward, 0.0).amax(-1).clamp(min=0),
        "reverse_kl": reverse_kl_per_token(student_logits, teacher_logits),
    }
