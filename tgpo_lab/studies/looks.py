"""What a study looks at in the students of a run's checkpoints, beside the measurements that every run makes."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import pandas as pd
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor

from ..batch import Batch
from ..config import TrainConfig
from ..diagnostics.gradient_signal import signal_moments
from ..diagnostics.premise import premise_by_depth
from ..evaluation import evaluate
from ..loop.student_pass import StudentPass, accumulate_gradients
from ..methods import make_method
from ..micro_batches import split_rows
from ..models.pairs import Pair
from ..randomness import generator_for
from ..sampling.cached_sampling import sample_responses
from ..tasks.rewards import reward_function, score
from ..teacher import ask_teacher

PROMPTS = 64
DEPTHS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
BELIEVABLE = 4.0  # nats: a prefix without a token more surprising than that counts as inside the horizon


def premise(pair: Pair, prompts: Dataset, config: TrainConfig) -> pd.DataFrame:
    """Means of :func:`premise_by_depth` for each depth, apart for prefixes inside and outside the trust horizon."""
    prompts = prompts.select(range(min(PROMPTS, len(prompts))))
    options = {"max_new_tokens": config.max_new_tokens, "reward": config.reward}
    sampled = evaluate(pair, prompts=prompts, temperature=1.0, seed=config.seed, **options)
    frame = premise_by_depth(pair, sampled, prompts, depths=DEPTHS, **options)
    frame["believable"] = frame.pop("prefix_surprise") <= BELIEVABLE
    groups = frame.drop(columns="row").groupby(["depth", "believable"])
    return groups.mean().assign(prefixes=groups.size()).reset_index()


def gradient(pair: Pair, prompts: Dataset, config: TrainConfig) -> pd.DataFrame:
    """One row: mean moments of the signal (:func:`signal_moments`), and cosines between whole gradients."""
    prompts = prompts.select(range(min(PROMPTS, len(prompts))))
    rollouts = sample_responses(
        pair.student, pair.encode(list(prompts["prompt"])), config.max_new_tokens, pair.end_tokens, pair.pad_token,
        samples_per_prompt=config.group_size, generator=generator_for(config.seed, "look"),
        vocabulary_size=pair.vocabulary_size,
    )  # fmt: skip
    answers = [answer for answer in prompts["answer"] for _ in range(config.group_size)]
    device = rollouts.responses.device
    batch = Batch(
        rollouts=rollouts,
        from_teacher=torch.zeros(len(rollouts), dtype=torch.bool, device=device),
        rewards=score(rollouts, answers, reward_function(config.reward), pair.tokenizer).to(device),
        teacher=ask_teacher(
            pair.teacher, rollouts, vocabulary_size=pair.vocabulary_size,
            micro_batch_tokens=config.micro_batch_tokens, keep_distribution=rollouts.mask,
        ),
        behaviour_logprobs=None,
        group_size=config.group_size,
        max_new_tokens=config.max_new_tokens,
        random=generator_for(config.seed, "look"),
    )  # fmt: skip
    row = {f"mean_{name}": value for name, value in _mean_moments(pair, batch, config).items()}
    directions = {
        "policy gradient": _direction(pair, batch, config, "rkl", "teacher"),
        "exact": _direction(pair, batch, config, "exact-rkl", "teacher"),
        "guidance": _direction(pair, batch, config, "tgpo", "teacher"),
        "reward": _direction(pair, batch, config, "grpo", "reward"),
    }
    for first, second in (
        ("policy gradient", "exact"), ("policy gradient", "reward"), ("exact", "reward"), ("guidance", "reward"),
        ("guidance", "exact"),
    ):  # fmt: skip
        row[f"cosine {first}, {second}"] = _cosine(directions[first], directions[second])
    return pd.DataFrame([row])


@torch.no_grad()
def _mean_moments(pair: Pair, batch: Batch, config: TrainConfig) -> dict[str, float]:
    sums: dict[str, float] = {}
    for part in split_rows(batch.rollouts, config.micro_batch_tokens):
        for positions in StudentPass(batch, part, pair, 1.0, nullcontext).positions():
            moments = signal_moments(positions.logits[0], positions.teacher_logits()[0], config.rejection_threshold)
            for name, value in moments.items():
                sums[name] = sums.get(name, 0.0) + float(value.sum())
    return {name: total / int(batch.rollouts.mask.sum()) for name, total in sums.items()}


def _direction(pair: Pair, batch: Batch, config: TrainConfig, method: str, kind: str) -> Tensor:
    """Gradient of one kind of a method's terms over all of the student's weights, as one vector."""
    parameters = list(pair.student.parameters())
    terms = [term for term in make_method(method).terms(batch, 0) if term.kind == kind]
    passes = (
        StudentPass(batch, part, pair, 1.0, nullcontext)
        for part in split_rows(batch.rollouts, config.micro_batch_tokens)
    )
    accumulate_gradients(passes, terms, Accelerator(mixed_precision="no"), nullcontext)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return torch.cat([gradient.flatten().double() for gradient in gradients])


def _cosine(first: Tensor, second: Tensor) -> float:
    """NaN where one of them is zero: without any right response there is no reward gradient."""
    norms = float(first.norm() * second.norm())
    return float(first @ second) / norms if norms > 0 else math.nan


LOOKS: dict[str, Callable[[Pair, Dataset, TrainConfig], pd.DataFrame]] = {"premise": premise, "gradient": gradient}
"""By name; each takes a pair whose student is the checkpoint's."""
