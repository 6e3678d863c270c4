"""What the logits of a position say: log-probabilities of tokens, entropy, and both KLs to another distribution.

Pure tensor functions; letters for shapes as in :mod:`tgpo_lab.losses`, which sums them over positions. All but the
entropy make their gradient themselves, with fewer passes over the vocabulary than PyTorch's own would need.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log π(tokens) under aligned ``logits``: (B, T, V), (B, T) → (B, T), or with K tokens a position (B, T, K) → same.

    The same as ``logits.log_softmax(-1)`` with entries picked at each position, with a third of the passes over
    the vocabulary, forward and backward. It can be differentiated once.
    """
    several = tokens.ndim == logits.ndim
    logprobs = _TokenLogprobs.apply(logits, tokens if several else tokens.unsqueeze(-1))
    return logprobs if several else logprobs.squeeze(-1)


class _TokenLogprobs(torch.autograd.Function):
    """log π(y) = logit_y − max_v logit_v + log max_v π(v), and its gradient, one at y, minus π; K tokens at once."""

    @staticmethod
    def forward(ctx, logits: Tensor, tokens: Tensor) -> Tensor:
        probabilities = logits.softmax(-1)
        # The most probable token is certain to have a logarithm, so the normaliser needs no sum of its own. Logits are
        # subtracted first: their difference is exact where both are large.
        ctx.save_for_backward(probabilities, tokens)
        return (logits.gather(-1, tokens) - logits.amax(-1, keepdim=True)) + probabilities.amax(-1, keepdim=True).log()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():  # once_differentiable lets sums with other terms pass, as if this one were constant
            raise RuntimeError("token_logprobs can be differentiated once only: leave create_graph=True out.")
        probabilities, tokens = ctx.saved_tensors
        return (probabilities * -gradient.sum(-1, keepdim=True)).scatter_add_(-1, tokens, gradient), None


def entropy(logits: Tensor) -> Tensor:
    """Entropy of each position's distribution in nats: (B, T, V) → (B, T)."""
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def reverse_kl_per_token(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(πθ‖πT) = Σ_v πθ(v)(log πθ(v) − log πT(v)) at each position: (B, T, V) twice → (B, T).

    It can be differentiated once.
    """
    return _KL.apply(student_logits, teacher_logits.detach(), True)


def forward_kl_per_token(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(πT‖πθ) = Σ_v πT(v)(log πT(v) − log πθ(v)) at each position: (B, T, V) twice → (B, T).

    It can be differentiated once.
    """
    return _KL.apply(student_logits, teacher_logits.detach(), False)


class _KL(torch.autograd.Function):
    """Either KL, with its gradient made in the forward pass: half of the tensors over the vocabulary and of the passes.

    Of the logit of v, KL(πθ‖πT) has the gradient πθ(v)(log πθ(v) − log πT(v) − KL), and KL(πT‖πθ) has πθ(v) − πT(v).
    """

    @staticmethod
    def forward(ctx, student_logits: Tensor, teacher_logits: Tensor, reverse: bool) -> Tensor:
        student = student_logits.log_softmax(-1)
        teacher = teacher_logits.log_softmax(-1).to(torch.promote_types(student.dtype, teacher_logits.dtype))
        # Each tensor is written over as soon as it has served.
        summands = torch.sub(student, teacher, out=teacher) if reverse else teacher - student
        policy = student.exp_()
        summands.mul_(policy if reverse else teacher.exp_())
        divergence = summands.sum(-1)
        gradient = None
        if ctx.needs_input_grad[0] and reverse:
            gradient = summands.addcmul_(policy, divergence.unsqueeze(-1), value=-1)
        elif ctx.needs_input_grad[0]:
            gradient = policy.sub_(teacher)
        ctx.save_for_backward(gradient)
        return divergence

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():  # as in _TokenLogprobs
            raise RuntimeError("A KL can be differentiated once only: leave create_graph=True out.")
        (of_logits,) = ctx.saved_tensors
        return of_logits * gradient.unsqueeze(-1), None, None
