"""Teacher-Guided Policy Optimization (arXiv 2605.13230), its variants and the ablation of its conditioning."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from torch import Tensor

from ..batch import Batch
from ..errors import InputError
from ..guidance import Doubt, Gate, apply_gate
from ..losses import forward_kl, guidance_loss, negative_log_likelihood, top_k_guidance_loss
from ..randomness import at_most
from ..schedules import Constant, LinearDecay, Schedule
from .base import Term, Traces, register
from .grpo import GRPO

Guidance = Literal["argmax", "sampled", "top_k", "full"]


@dataclass(frozen=True)
class TGPO(GRPO):
    """L = L_GRPO + w_k·L_G with L_G = −Σ_t log πθ(y_t^T | x, y_<t), y_t^T = argmax_v πT(v | x, y_<t).

    The prefixes are the student's own. Guidance is a regulariser and not a reward: it moves the
    teacher's token, while a reward would be credited to the token that the student wrote.

    The paper writes L_G as a sum over tokens, public code of the method takes the masked mean.
    The mean is the default: then w means the same for every length.
    """

    weight: Schedule = field(default_factory=lambda: LinearDecay(2e-3, 1e-5))
    """w_k; the paper's reaches 0 at step 200."""
    guidance: Guidance = "argmax"
    """The teacher's best token, one drawn from it, its top-k, or its whole distribution (forward KL)."""
    guidance_top_k: int = 8
    """K of ``top_k``."""
    guidance_sum: bool = False
    """Sum over the tokens of a response (mean over responses) as the paper writes it, not the mean over tokens."""
    gate: Gate = "none"
    """Where guidance counts: everywhere, where the teacher is confident, up to the first departure from its
    best token, or within the trust horizon. A gate takes tokens away; it makes no other token heavier."""
    gate_threshold: float = 4.0
    """Trust horizon: τ, the nats of doubt at which it ends. Confidence: the probability to exceed."""
    doubt: Doubt = "worst_token"
    """Of the trust horizon: what the teacher's doubt at a prefix is, its most surprising token or the sum of the
    surprises of its tokens, −log πT(y_i | x, y_<i) in nats."""
    doubt_memory: float = 1.0
    """Of the trust horizon: λ, by which doubt fades with every token. At 1 it never does, and with the sum a long
    response ends its horizon by ordinary entropy; at 0.9 half of it is forgotten after 6.6 tokens; at 0 the last
    token alone counts."""
    soft_horizon: bool = False
    """Of the trust horizon: weigh guidance by exp(−doubt/τ), in place of 1 up to a doubt of τ and 0 above."""
    conditioned: bool = True
    """False is the ablation: tokens from the teacher's own responses, in each step as many as the student wrote."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("guidance", Guidance), ("gate", Gate), ("doubt", Doubt)):
            if getattr(self, name) not in get_args(known):
                choices = ", ".join(get_args(known))
                raise InputError(f"{name} must be one of {choices}, but is {getattr(self, name)!r}.")
        if self.guidance_top_k < 1:
            raise InputError(f"guidance_top_k must be 1 or more, but is {self.guidance_top_k}.")
        if self.gate == "confidence" and not 0 < self.gate_threshold < 1:
            raise InputError(f"gate_threshold of the confidence gate is a probability, but is {self.gate_threshold}.")
        if self.gate == "trust_horizon" and not 0 < self.gate_threshold < math.inf:
            raise InputError(
                f"gate_threshold of the trust horizon is a number of nats above 0, but is {self.gate_threshold}."
            )
        if not 0 <= self.doubt_memory <= 1:
            raise InputError(
                f"doubt_memory must be from 0 (the last token alone) to 1 (never fades), but is {self.doubt_memory}."
            )
        horizon = (self.doubt, self.doubt_memory, self.soft_horizon)
        if self.gate != "trust_horizon" and horizon != (TGPO.doubt, TGPO.doubt_memory, TGPO.soft_horizon):
            raise InputError(
                f"doubt, doubt_memory and soft_horizon are options of the gate trust_horizon, but gate is {self.gate}."
            )
        if not self.conditioned and (self.gate != "none" or self.guidance != "argmax"):
            raise InputError("Guidance from the teacher's own responses (conditioned=False) takes no gate or ladder.")

    @property
    def schedule(self) -> Schedule:
        return self.weight

    @property
    def needs_distribution(self) -> bool:
        return self.guidance == "full"

    @property
    def logit_tensors(self) -> int:
        return super().logit_tensors + (4 if self.needs_distribution else 0)

    @property
    def top_k(self) -> int:
        return self.guidance_top_k if self.guidance == "top_k" else 0

    @property
    def samples_teacher_tokens(self) -> bool:
        return self.guidance == "sampled"

    @property
    def teacher_traces(self) -> Traces:
        return "none" if self.conditioned else "one_per_sample"

    def terms(self, batch: Batch, step: int) -> list[Term]:
        return [self.reward_term(batch), self.guidance_term(batch, self.weight(step))]

    def guidance_term(self, batch: Batch, weight: float) -> Term:
        """w_k·L_G on the student's prefixes (or, as an ablation, on the teacher's own)."""
        everywhere = batch.student_mask
        normalizer = self.count(everywhere, batch)
        if self.guidance_sum:
            normalizer = max(1, int(everywhere.any(-1).sum()))
        if not self.conditioned:
            mask = at_most(int(everywhere.sum()), batch.teacher_mask, batch.random)
            return Term("teacher", mask, lambda p, mask: negative_log_likelihood(p.logprobs, mask, normalizer), weight)
        answers = batch.teacher
        weights = self.gate_weights(batch)
        mask = everywhere & (weights > 0)
        guided = weights[everywhere].sum() / max(1, int(everywhere.sum()))

        def loss(positions, mask):
            here = positions.take(weights)
            if self.guidance == "full":
                return forward_kl(positions.logits, positions.teacher_logits(), mask, normalizer, here)
            if self.guidance == "top_k":
                tokens, logprobs = positions.take(answers.top_tokens), positions.take(answers.top_logprobs)
                return top_k_guidance_loss(positions.logits, tokens, logprobs, mask, normalizer, here)
            if self.guidance == "sampled":
                return guidance_loss(positions.logits, positions.take(answers.sampled_tokens), mask, normalizer, here)
            return negative_log_likelihood(positions.teacher_token_logprobs, mask, normalizer, here)

        return Term("teacher", mask, loss, weight, guided)

    def gate_weights(self, batch: Batch) -> Tensor:
        """(B, T) from 0 to 1: how much guidance counts at each position."""
        return apply_gate(
            self.gate,
            self.gate_threshold,
            batch.rollouts.responses,
            batch.teacher,
            doubt=self.doubt,
            memory=self.doubt_memory,
            soft=self.soft_horizon,
        )


_TINY: dict[str, object] = {"weight": LinearDecay(0.02, 2e-4)}
register(
    "tgpo", TGPO(), "GRPO plus annealed cross-entropy on the teacher's token at the student's prefixes.", tiny=_TINY
)
register(
    "tgpo-constant",
    TGPO(weight=Constant(2e-3)),
    "TGPO without annealing: the guidance weight stays.",
    tiny={"weight": Constant(0.02)},
)
register("tgpo-sampled", TGPO(guidance="sampled"), "TGPO with a token drawn from the teacher.", tiny=_TINY)
register("tgpo-top-k", TGPO(guidance="top_k"), "TGPO with the teacher's eight best tokens.", tiny=_TINY)
register("tgpo-full", TGPO(guidance="full"), "TGPO with the whole teacher distribution (forward KL).", tiny=_TINY)
register(
    "tgpo-confidence",
    TGPO(gate="confidence", gate_threshold=0.9),
    "TGPO only where the teacher gives its token more than 0.9.",
    tiny=_TINY,
)
register(
    "tgpo-first-departure",
    TGPO(gate="first_departure"),
    "TGPO up to the student's first departure from the teacher's best token.",
    tiny=_TINY,
)
register(
    "tgpo-trust-horizon",
    TGPO(gate="trust_horizon"),
    "TGPO until the student writes a token that the teacher gives less than e^−4.",
    tiny=_TINY,
)
# One step at a time from there: first the horizon comes back, then its edge is soft. With λ = 0.9 one token below
# e^−8 shuts it, and so does a steady surprise above 0.8 nats a token. In the tiny world a terse student's first token
# is a departure of 14 nats (far) or 20 (far-fragile) and shuts it for 6 or 9 tokens: for a terse response of 8, and
# not for the 50 tokens of a worked one that opens late.
_RECOVERING = TGPO(gate="trust_horizon", gate_threshold=8.0, doubt="sum", doubt_memory=0.9)
register(
    "tgpo-recovering-horizon",
    _RECOVERING,
    "TGPO while the teacher's doubt D is at most 8 nats: its surprises added up, each fading to 0.9 with every token.",
    tiny=_TINY,
)
register(
    "tgpo-soft-horizon",
    replace(_RECOVERING, soft_horizon=True),
    "TGPO weighted by exp(−D/8) with that doubt D: guidance fades as it grows and comes back as it fades.",
    tiny=_TINY,
)
register(
    "tgpo-unconditioned",
    TGPO(conditioned=False),
    "Ablation: the same loss on the teacher's own responses, in each step on as many tokens as the student wrote.",
    tiny=_TINY,
)
