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
    """Gathers, chunk by chunk, what is to be known of the student's tokens of one step."""

    def __init__(self, batch: Batch, rows: Tensor, measured: Tensor, rejection_threshold: float):
        """Measure a batch.

        Args:
            batch: of all processes.
            rows: (N,) int64 those that this process will take in.
            measured: (B, T) bool, positions at which whole distributions are compared.
            rejection_threshold: in nats.
        """
        self._batch, self._measured, self._threshold = batch, measured, rejection_threshold
        self._own = batch.restricted_to(rows.to(measured.device)).student_mask
        self.restart()

    def restart(self) -> None:
        """Forget all positions."""
        # Of single tokens, log πθ alone: everything else about them is computed once for the whole step.
        self._logprobs = torch.zeros_like(self._batch.teacher.logprobs)
        names = ["entropy", "agreement"]
        if self._batch.teacher.hidden_index is not None:  # a server gives no whole distributions
            names += ["teacher_entropy", "reverse_kl", "forward_kl"]
        self._distributions = dict.fromkeys(names, 0.0)
        self._distribution_count = 0

    @torch.no_grad()
    def add(self, positions: Positions) -> None:
        """Take in a chunk of the first pass, before any update."""
        positions.write_logprobs(self._logprobs)
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

    def _of_tokens(self) -> dict[str, float]:
        """Sums over the tokens of this process."""
        difference = (self._logprobs - self._batch.teacher.logprobs)[self._own]  # d_t
        return {
            "kl_sampled": float(difference.sum()),
            "rejected": float((difference > self._threshold).sum()),
            "positive_signal": float((difference < 0).sum()),
        }

    def _of_engine(self) -> tuple[dict[str, float], Tensor]:
        """The log-probabilities under which this process's tokens were drawn beside those of the update: sums over
        tokens, and the largest distance, (1,)."""
        largest = torch.zeros(1, dtype=torch.float64)
        if self._batch.rollouts.logprobs is None:
            return {}, largest
        # In double precision: between float32 numbers the estimate of the KL would be rounding noise, even negative.
        drawn, updated = (x[self._own].double() for x in (self._batch.rollouts.logprobs, self._logprobs))
        distance = (updated - drawn).abs()
        sums = {
            "engine_difference": float(distance.sum()),
            "engine_kl": float(sampled_kl(drawn, updated, "k3").sum()),
        }
        if self._batch.importance_cap is not None:
            sums["importance_truncated"] = float((updated - drawn > math.log(self._batch.importance_cap)).sum())
        return sums, torch.cat([largest, distance.cpu()]).max().reshape(1)

    def summary(self, processes: Processes) -> dict[str, float]:
        """Means over tokens, and means over the student's responses, of all processes."""
        batch, rows = self._batch, self._batch.student_rows
        of_engine, largest = self._of_engine()
        of_tokens = self._of_tokens() | of_engine
        counts = {"token_count": int(self._own.sum()), "distribution_count": self._distribution_count}
        totals = processes.totals({**of_tokens, **self._distributions, **counts})
        if of_engine:
            largest = processes.divided(processes.number, lambda _: largest)  # one for each process
        rollouts = batch.rollouts
        return {
            "reward": float(batch.rewards[:rows].mean()),
            "length": float(rollouts.lengths[:rows].float().mean()),
            "truncated": float((~rollouts.finished[:rows]).float().mean()),
            "tokens": float(batch.student_mask.sum()),
            "teacher_trace_tokens": float(batch.teacher_mask.sum()),
            **{name: totals[name] / max(1, totals["token_count"]) for name in of_tokens},
            **{name: totals[name] / max(1, totals["distribution_count"]) for name in self._distributions},
            **({"engine_difference_largest": float(largest.max())} if of_engine else {}),
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
