"""Methods driven by the teacher's distribution: SFT, reverse KL in two forms, GKD/JSD, KDRL."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..batch import Batch
from ..errors import InputError
from ..losses import generalized_jsd, kdrl_loss, negative_log_likelihood, reverse_kl, reverse_kl_advantage
from ..schedules import LinearDecay, Schedule
from .base import Method, Term, Traces, register, require_clip, surrogate_loss
from .grpo import GRPO, spread


@dataclass(frozen=True)
class SupervisedFineTuning(Method):
    """Cross-entropy on responses that the teacher writes to the same prompts, as many as the student's.

    The student's own rollouts are sampled and measured as with every method, but not learned from.
    """

    @property
    def teacher_traces(self) -> Traces:
        return "one_per_sample"

    def terms(self, batch: Batch, step: int) -> list[Term]:
        mask = batch.teacher_mask
        normalizer = max(1, int(mask.sum()))
        return [
            Term(
                "teacher", mask, lambda positions, mask: negative_log_likelihood(positions.logprobs, mask, normalizer)
            ),
        ]


@dataclass(frozen=True)
class ReverseKLPolicyGradient(Method):
    """OP-Distill: reverse KL as policy gradient, reward −log ρ_t = log πT(y_t) − log πθ(y_t) per token.

    No task reward; γ = 0, so a token gets no credit for what comes after it. The clipped surrogate
    of PPO bounds the ratio, not the reward, which is as large as the two policies are apart.
    """

    clip_low: float = 0.2
    """The ratio πθ/π_old is held above 1 − clip_low where the advantage is negative."""
    clip_high: float = 0.2
    """The ratio is held below 1 + clip_high where the advantage is positive."""

    def __post_init__(self) -> None:
        require_clip(self.clip_low, self.clip_high)

    def terms(self, batch: Batch, step: int) -> list[Term]:
        mask = batch.student_mask
        normalizer = max(1, int(mask.sum()))

        def loss(positions, mask):
            advantages = reverse_kl_advantage(positions.behaviour_logprobs, positions.take(batch.teacher.logprobs))
            return surrogate_loss(positions, advantages, mask, self.clip_low, self.clip_high, normalizer)

        return [Term("teacher", mask, loss)]


@dataclass(frozen=True)
class ExactReverseKL(Method):
    """Σ_v πθ(v)(log πθ(v) − log πT(v)) at every position of the student's rollouts, differentiated directly."""

    @property
    def needs_distribution(self) -> bool:
        return True

    @property
    def asks_for_logits_alone(self) -> bool:
        return True

    @property
    def logit_tensors(self) -> int:
        return 8

    def terms(self, batch: Batch, step: int) -> list[Term]:
        mask = batch.student_mask
        normalizer = max(1, int(mask.sum()))
        return [Term("teacher", mask, lambda p, mask: reverse_kl(p.logits, p.teacher_logits(), mask, normalizer))]


@dataclass(frozen=True)
class GeneralizedKnowledgeDistillation(Method):
    """GKD (arXiv 2306.13649): JSD(β) at every position of the student's rollouts; β = 0 is the forward KL."""

    beta: float = 0.5
    """0 forward KL, 1 reverse KL, between them the generalised Jensen–Shannon divergence."""

    @property
    def needs_distribution(self) -> bool:
        return True

    @property
    def asks_for_logits_alone(self) -> bool:
        return True

    @property
    def logit_tensors(self) -> int:
        return 12 if 0 < self.beta < 1 else 9

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise InputError(f"beta must be from 0 (forward KL) to 1 (reverse KL), but is {self.beta}.")

    def terms(self, batch: Batch, step: int) -> list[Term]:
        mask = batch.student_mask
        normalizer = max(1, int(mask.sum()))
        return [
            Term(
                "teacher",
                mask,
                lambda p, mask: generalized_jsd(p.logits, p.teacher_logits(), mask, self.beta, normalizer),
            )
        ]


@dataclass(frozen=True)
class KDRL(GRPO):
    """GRPO − β_k·½d_t² (arXiv 2506.02208), d_t = log πθ(y_t) − log πT(y_t), the k2 term differentiated directly."""

    weight: Schedule = field(default_factory=lambda: LinearDecay(5e-3, 5e-5, floor=1e-3))
    """β_k of the teacher term."""
    distil_on: Literal["all", "wrong_responses", "wrong_groups"] = "all"
    """Where the teacher term counts: everywhere, on wrong responses, or in groups without a right one."""

    @property
    def schedule(self) -> Schedule:
        return self.weight

    def terms(self, batch: Batch, step: int) -> list[Term]:
        mask = batch.student_mask
        normalizer = self.count(mask, batch)  # of all tokens: a mask takes tokens away, it makes none heavier
        right = batch.rewards[: batch.student_rows] > 0
        if self.distil_on == "wrong_responses":
            mask = mask & spread(~right, batch)
        elif self.distil_on == "wrong_groups":
            hopeless = ~right.view(-1, batch.group_size).any(-1)
            mask = mask & spread(hopeless.repeat_interleave(batch.group_size), batch)

        def loss(positions, mask):
            teacher = positions.take(batch.teacher.logprobs)
            return kdrl_loss(positions.logprobs, teacher, mask, normalizer, positions.importance_weights)

        return [self.reward_term(batch), Term("teacher", mask, loss, self.weight(step))]


register("sft", SupervisedFineTuning(), "Supervised fine-tuning on the teacher's own responses.")
register(
    "rkl",
    ReverseKLPolicyGradient(),
    "OP-Distill: reverse KL as policy gradient on the student's samples, no task reward.",
    alias="op-distill",
)
register("exact-rkl", ExactReverseKL(), "Reverse KL over the whole vocabulary at every position.")
register("gkd", GeneralizedKnowledgeDistillation(), "GKD: generalised Jensen–Shannon divergence, β = 0.5.", alias="jsd")
register(
    "forward-kl", GeneralizedKnowledgeDistillation(beta=0.0), "GKD with β = 0: forward KL on the student's prefixes."
)
_KDRL_TINY: dict[str, object] = {"weight": LinearDecay(0.05, 5e-4, floor=0.01)}
register("kdrl", KDRL(), "GRPO with an annealed k2 reverse-KL term on all tokens.", tiny=_KDRL_TINY)
register(
    "kdrl-wrong-responses",
    KDRL(distil_on="wrong_responses"),
    "KDRL with the teacher term on wrong responses alone.",
    tiny=_KDRL_TINY,
)
register(
    "kdrl-wrong-groups",
    KDRL(distil_on="wrong_groups"),
    "KDRL with the teacher term in groups without a right response.",
    tiny=_KDRL_TINY,
)
