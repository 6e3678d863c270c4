"""Accuracy of a model on held-out prompts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from .errors import InputError
from .models.pairs import Pair, require_room
from .parallel.processes import ALONE, Processes
from .randomness import generator_for
from .rollouts import Rollouts, join_rollouts
from .sampling.divided_sampling import sample_divided
from .sampling.engine import Engine, OwnEngine
from .tasks.prompts import load_prompts
from .tasks.rewards import reward_function, score

PROMPTS_AT_ONCE = 128
"""Size of a batch of held-out prompts."""


@dataclass(frozen=True)
class Evaluation:
    """Result of :func:`evaluate`."""

    accuracy: float
    """Share of right responses."""
    length: float
    """Mean number of response tokens."""
    truncated: float
    """Share of responses cut at the token limit."""
    rewards: Tensor
    """(B,) reward of each response, groups of ``samples_per_prompt`` together."""
    rollouts: Rollouts

    def pass_at_k(self, samples_per_prompt: int, k: int) -> float:
        """Unbiased estimate of the chance that one of k samples is right (Chen et al. 2021, arXiv 2107.03374).

        Raises:
            InputError: k exceeds the number of samples.
        """
        if not 1 <= k <= samples_per_prompt:
            raise InputError(f"pass@k needs 1 ≤ k ≤ samples per prompt ({samples_per_prompt}), but k is {k}.")
        right = (self.rewards.view(-1, samples_per_prompt) > 0).sum(-1).double()
        wrong = samples_per_prompt - right
        all_wrong = torch.ones_like(wrong)
        for i in range(k):
            all_wrong = all_wrong * (wrong - i).clamp(min=0) / (samples_per_prompt - i)
        return float((1 - all_wrong).mean())


def evaluate(
    pair: Pair,
    model: PreTrainedModel | None = None,
    *,
    prompts: Dataset | None = None,
    split: str = "test",
    count: int | None = None,
    temperature: float = 0.0,
    samples_per_prompt: int = 1,
    max_new_tokens: int = 80,
    reward: str = "marked_answer",
    seed: int = 0,
    prompts_at_once: int = PROMPTS_AT_ONCE,
    processes: Processes = ALONE,
    engine: Engine | None = None,
) -> Evaluation:
    """Let a model answer prompts and judge the answers.

    Args:
        pair: brings the tokenizer and, unless ``prompts`` is given, the prompts.
        model: the model to evaluate; the pair's student by default.
        prompts: rows with ``prompt`` and ``answer``; by default ``split`` of the pair's own.
        split: ``validation`` or ``test``.
        count: the first so many prompts; all by default.
        temperature: 0 takes the most probable token each time.
        samples_per_prompt: responses for each prompt.
        max_new_tokens: responses are cut after so many tokens, and then count as wrong.
        reward: name of the reward.
        seed: decides the samples.
        prompts_at_once: size of a batch.
        processes: each answers its share of a batch; all get the whole result.
        engine: samples from the model; by default the loop's own.

    Raises:
        InputError: no prompts, no such split, unknown reward, prompts too long for the model.
    """
    judge = reward_function(reward)
    if prompts is None:
        prompts = pair_prompts(pair, split)
    prompts = prompts.select(range(min(count or len(prompts), len(prompts))))
    model = pair.student if model is None else model
    require_room(pair, prompts["prompt"], max_new_tokens, model=model)
    parts, rewards = [], []
    for start in range(0, len(prompts), prompts_at_once):
        chunk = prompts[start : start + prompts_at_once]
        rollouts = sample_divided(
            processes,
            engine or OwnEngine(model),
            pair.encode(chunk["prompt"]),
            max_new_tokens,
            pair.end_tokens,
            pair.pad_token,
            samples_per_prompt=samples_per_prompt,
            temperature=temperature,
            generator=generator_for(seed, "evaluation", start),
            vocabulary_size=pair.vocabulary_size,
        )
        answers = [answer for answer in chunk["answer"] for _ in range(samples_per_prompt)]
        rewards.append(score(rollouts, answers, judge, pair.tokenizer, processes=processes))
        parts.append(rollouts)
    rollouts = join_rollouts(parts)
    all_rewards = torch.cat(rewards)
    return Evaluation(
        accuracy=float(all_rewards.mean()),
        length=float(rollouts.lengths.float().mean()),
        truncated=float((~rollouts.finished).float().mean()),
        rewards=all_rewards,
        rollouts=rollouts,
    )


def pair_prompts(pair: Pair, split: str) -> Dataset:
    """A split of the prompts that a pair brings.

    Raises:
        InputError: the pair brings none, or not that split.
    """
    if pair.prompts is None:
        raise InputError(f"{pair.name} brings no prompts. Give a dataset: a folder with train.jsonl, or a hub name.")
    splits = load_prompts(pair.prompts)
    if split not in splits:
        raise InputError(f"There is no split {split!r} in {pair.prompts.name}: choose one of {', '.join(splits)}.")
    return splits[split]
