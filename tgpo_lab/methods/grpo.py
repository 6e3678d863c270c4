"""Methods driven by the verifiable reward: GRPO, GRPO++ and LUFFY."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..batch import Batch
from ..errors import InputError
from ..losses import entropy, group_advantages, luffy_off_policy_loss, masked_sum
from .base import Method, Term, Traces, register, require_clip, surrogate_loss


def spread(values: Tensor, batch: Batch) -> Tensor:
    """One value per student row onto its tokens: (student rows,) → (B, T), zero on the teacher's rows."""
    per_row = torch.zeros(len(batch.rollouts), device=values.device, dtype=values.dtype)
    per_row[: len(values)] = values
    return per_row.unsqueeze(-1).expand(batch.rollouts.mask.shape)


@dataclass(frozen=True)
class GRPO(Method):
    """Group relative policy optimisation (DeepSeekMath, arXiv 2402.03300), token-normalised, no KL to a reference."""

    clip_low: float = 0.2
    """The ratio πθ/π_old is held above 1 − clip_low where the advantage is negative."""
    clip_high: float = 0.2
    """The ratio is held below 1 + clip_high where the advantage is positive."""
    normalize_std: bool = True
    """Divide advantages by the standard deviation of the group."""
    normalizer: Literal["tokens", "limit"] = "tokens"
    """Divide by the response tokens of the batch, or by rows × token limit (independent of length)."""
    drop_uniform_groups: bool = False
    """Leave groups whose rewards are all equal out of the normaliser; their advantages are zero anyway."""
    entropy_bonus: float = 0.0
    """Weight of the mean entropy that is added to the objective."""

    def __post_init__(self) -> None:
        require_clip(self.clip_low, self.clip_high)
        if not self.entropy_bonus >= 0:
            raise InputError(f"entropy_bonus must be 0 or more, but is {self.entropy_bonus}.")

    @property
    def needs_rewards_in_groups(self) -> bool:
        return True

    @property
    def logit_tensors(self) -> int:
        return super().logit_tensors + (3 if self.entropy_bonus else 0)

    def terms(self, batch: Batch, step: int) -> list[Term]:
        return [self.reward_term(batch)]

    def reward_term(self, batch: Batch) -> Term:
        """−1/Z Σ min(ρA, clip(ρ)A): the clipped surrogate with group advantages."""
        mask = batch.student_mask
        rewards = batch.rewards[: batch.student_rows]
        advantages = spread(group_advantages(rewards, batch.group_size, self.normalize_std), batch)
        if self.drop_uniform_groups:
            groups = rewards.view(-1, batch.group_size)
            mixed = (groups != groups[:, :1]).any(-1).repeat_interleave(batch.group_size)
            mask = mask & spread(mixed, batch)
        normalizer = self.count(mask, batch)

        def loss(positions, mask):
            surrogate = surrogate_loss(
                positions, positions.take(advantages), mask, self.clip_low, self.clip_high, normalizer
            )
            if self.entropy_bonus:
                surrogate = surrogate - self.entropy_bonus * masked_sum(entropy(positions.logits), mask, normalizer)
            return surrogate

        return Term("reward", mask, loss)

    def count(self, mask: Tensor, batch: Batch) -> int:
        """The number that the masked sums of this (mini-)batch are divided by."""
        if self.normalizer == "limit":
            return max(1, int(mask.any(-1).sum()) * batch.max_new_tokens)
        return max(1, int(mask.sum()))


@dataclass(frozen=True)
class LUFFY(Method):
    """One of the G responses is the teacher's own (arXiv 2504.14945): off-policy traces beside on-policy samples.

    The student's last sample of each group gives way to the trace. Advantages are r − mean over the
    group with the trace, not divided by the standard deviation; on-policy tokens get −A·ρ without
    clip, the trace −A·p/(p + γ).
    """

    gamma: float = 0.1
    """γ of the policy shaping p/(p + γ)."""

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise InputError(f"gamma must be positive, but is {self.gamma}.")

    @property
    def teacher_traces(self) -> Traces:
        return "one_per_prompt"

    @property
    def needs_rewards_in_groups(self) -> bool:
        return True

    def terms(self, batch: Batch, step: int) -> list[Term]:
        count, size = batch.student_rows, batch.group_size
        groups = batch.rewards[:count].view(-1, size).clone()  # (prompts, G)
        groups[:, -1] = batch.rewards[count:]
        advantages = group_advantages(groups.flatten(), size, normalize_std=False).view(-1, size)
        replaced = torch.zeros_like(groups, dtype=torch.bool)
        replaced[:, -1] = True
        on_policy = batch.student_mask & ~spread(replaced.flatten(), batch)
        off_policy = batch.teacher_mask
        per_row = torch.cat([advantages.flatten(), advantages[:, -1]])  # student rows, then the traces
        per_token = per_row.unsqueeze(-1).expand(batch.rollouts.mask.shape)
        normalizer = max(1, int(on_policy.sum() + off_policy.sum()))

        def on_policy_loss(positions, mask):
            return surrogate_loss(positions, positions.take(per_token), mask, math.inf, math.inf, normalizer)

        def off_policy_loss(positions, mask):
            return luffy_off_policy_loss(positions.logprobs, positions.take(per_token), mask, self.gamma, normalizer)

        return [Term("reward", on_policy, on_policy_loss), Term("teacher", off_policy, off_policy_loss)]


register("grpo", GRPO(), "Verifiable reward alone: group advantages, clipped surrogate.")
register(
    "grpo++",
    GRPO(clip_high=0.28, normalize_std=False, normalizer="limit", drop_uniform_groups=True),
    "GRPO with clip-higher (0.28), no division by the standard deviation, a normaliser that does not depend on "
    "length, and groups of equal rewards dropped (the recipes of DAPO and Dr. GRPO).",
)
register("luffy", LUFFY(), "GRPO in which one response of each group is the teacher's, with policy shaping.")
