"""Measuring a step on the forward pass that the update makes anyway. The same for every method."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..batch import Batch, Positions
from ..losses import entropy, forward_kl_per_token, reverse_kl_per_token, sampled_kl
from ..methods.base import Method, Term
from ..models.policy import most_probable
from ..parallel.processes import Processes
from ..parallel.sharding import own_part
from ..randomness import at_most
from ..rollouts import Rollouts


def choose_measured(rollouts: Rollouts, count: int, generator: torch.Generator) -> Tensor:
    """Positions at which whole distributions are compared: (B, T) bool, at most ``count`` at random (0: all)."""
    return at_most(count, rollouts.mask, generator) if count else rollouts.mask.clone()


class StepMeasurement:
    """Sums over the student's tokens of one step, gathered micro-batch by micro-batch."""

    def __init__(self, batch: Batch, measured: Tensor, rejection_threshold: float):
        self._batch, self._measured, self._threshold = batch, measured, rejection_threshold
        self.restart()

    def restart(self) -> None:
        """Forget all positions."""
        self._tokens = {"kl_sampled": 0.0, "rejected": 0.0, "positive_signal": 0.0}
        names = ["entropy", "agreement"]
        if self._batch.teacher.hidden_index is not None:  # a server gives no whole distributions
            names += ["teacher_entropy", "reverse_kl", "forward_kl"]
        self._distributions = dict.fromkeys(names, 0.0)
        self._engine = dict.fromkeys(("engine_difference", "engine_kl", "importance_truncated"), 0.0)
        self._engine_largest = torch.zeros(1, dtype=torch.float64)
        self._token_count = self._distribution_count = 0

    @torch.no_grad()
    def add(self, positions: Positions) -> None:
        """Take in a micro-batch of the first pass, before any update."""
        own = positions.take(self._batch.student_mask)
        difference = (positions.logprobs - positions.take(self._batch.teacher.logprobs))[own]  # d_t
        self._token_count += difference.numel()
        self._tokens["kl_sampled"] += float(difference.sum())
        self._tokens["rejected"] += float((difference > self._threshold).sum())
        self._tokens["positive_signal"] += float((difference < 0).sum())
        self._add_engine(positions, own)

        where = positions.take(self._measured).squeeze(0)
        if not bool(where.any()):
            return
        student = positions.logits[:, where]  # (1, measured, V)
        values = {"entropy": entropy(student)}
        if "reverse_kl" in self._distributions:
            teacher = positions.teacher_logits(where)
            values |= {
                "teacher_entropy": entropy(teacher),
                "reverse_kl": reverse_kl_per_token(student, teacher),
                "forward_kl": forward_kl_per_token(student, teacher),
            }
        best = positions.take(self._batch.teacher.tokens)[:, where]
        values["agreement"] = (most_probable(student[0]) == best[0]).float()
        self._distribution_count += student.shape[1]
        for name, value in values.items():
            self._distributions[name] += float(value.sum())

    def _add_engine(self, positions: Positions, own: Tensor) -> None:
        """Compare the log-probabilities under which tokens were drawn with those of the update."""
        batch = self._batch
        if batch.rollouts.logprobs is None or not bool(own.any()):
            return
        # In double precision: between float32 numbers the estimate of the KL would be rounding noise, even negative.
        drawn = positions.take(batch.rollouts.logprobs)[own].double()
        updated = positions.behaviour_logprobs[own].double()
        distance = (updated - drawn).abs()
        self._engine["engine_difference"] += float(distance.sum())
        self._engine["engine_kl"] += float(sampled_kl(drawn, updated, "k3").sum())
        if batch.importance_cap is not None:
            self._engine["importance_truncated"] += float((updated - drawn > math.log(batch.importance_cap)).sum())
        self._engine_largest = self._engine_largest.maximum(distance.max().cpu())

    def _engine_summary(self, totals: dict[str, float], processes: Processes) -> dict[str, float]:
        if self._batch.rollouts.logprobs is None:
            return {}
        found = {name: totals[name] / max(1, totals["token_count"]) for name in self._engine}
        if self._batch.importance_cap is None:
            del found["importance_truncated"]
        largest = processes.divided(processes.number, lambda _: self._engine_largest)  # one for each process
        return {**found, "engine_difference_largest": float(largest.max())}

    def summary(self, processes: Processes) -> dict[str, float]:
        """Means over tokens, and means over the student's responses, of all processes."""
        counts = {"token_count": self._token_count, "distribution_count": self._distribution_count}
        totals = processes.totals({**self._tokens, **self._distributions, **self._engine, **counts})
        batch, rows = self._batch, self._batch.student_rows
        rollouts = batch.rollouts
        return {
            "reward": float(batch.rewards[:rows].mean()),
            "length": float(rollouts.lengths[:rows].float().mean()),
            "truncated": float((~rollouts.finished[:rows]).float().mean()),
            "tokens": float(batch.student_mask.sum()),
            "teacher_trace_tokens": float(batch.teacher_mask.sum()),
            **{name: totals[name] / max(1, totals["token_count"]) for name in self._tokens},
            **{name: totals[name] / max(1, totals["distribution_count"]) for name in self._distributions},
            **self._engine_summary(totals, processes),
        }


class ClippedTokens:
    """Counts the student's tokens whose ratio πθ/π_old lies outside a method's clip range."""

    def __init__(self, method: Method):
        self._low, self._high = (getattr(method, name, math.inf) for name in ("clip_low", "clip_high"))
        self.restart()

    def restart(self) -> None:
        """Forget all positions."""
        self.count = 0

    @torch.no_grad()
    def add(self, positions: Positions) -> None:
        """Take in a chunk of positions of the update."""
        ratio = (positions.logprobs - positions.behaviour_logprobs).exp()
        outside = (ratio < 1 - self._low) | (ratio > 1 + self._high)
        self.count += int((outside & positions.take(positions.batch.student_mask)).sum())


def gradients_by_kind(
    gradients: Callable[[list[Term]], object],
    terms: list[Term],
    parameters: list[torch.nn.Parameter],
    processes: Processes,
) -> dict[str, float]:
    """Norm of each kind of term's own gradient, and the cosine if there are both kinds.

    Args:
        gradients: gives the parameters the gradient of some terms; one forward and backward pass for each kind.
        terms: of the method's loss.
        parameters: their ``.grad`` is left empty.
        processes: over which the parameters may be sharded.
    """
    sums: dict[str, list[Tensor]] = {}
    for kind in dict.fromkeys(term.kind for term in terms if term.weight):
        gradients([term for term in terms if term.kind == kind])
        sums[kind] = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None

    def product(first: list[Tensor], second: list[Tensor]) -> float:
        parts = zip(map(own_part, first), map(own_part, second), strict=True)
        value = sum(float((a.double() * b.double()).sum()) for a, b in parts)
        return processes.totals({"product": value})["product"] if processes.sharded else value

    norms = {kind: math.sqrt(product(s, s)) for kind, s in sums.items()}
    result = {f"gradient_norm_{kind}": norm for kind, norm in norms.items()}
    if len(norms) == 2 and all(norms.values()):
        result["gradient_cosine"] = product(sums["reward"], sums["teacher"]) / (norms["reward"] * norms["teacher"])
    return result
