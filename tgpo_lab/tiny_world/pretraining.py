"""Supervised training that makes the tiny students and teachers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ..errors import InputError
from ..sampling.cached_sampling import sample_responses
from ..tasks.rewards import marked_answer, score
from .arithmetic import worked_text
from .recipes import Pretraining, StudentRecipe, TeacherRecipe
from .texts import TextBatch, TextSource

# A small model whose opening is told to be improbable would otherwise trade it against the rest.
OPENING_WEIGHT = 0.1
# From so many tokens on, texts of a batch that are less than half as long go through the model by themselves. Below, a
# second pass costs the shipped models as much as the padding that it saves.
LONG_TEXT = 100
# Steps between measurements of a teacher that learns until it is reliable enough, and prefixes of each.
RELIABILITY_EVERY, RELIABILITY_PREFIXES = 10, 128


def untrained_student(recipe: StudentRecipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A student as it is before its first step. Llama architecture."""
    return LlamaForCausalLM(LlamaConfig(**_shape(recipe, tokenizer)))


def untrained_teacher(recipe: TeacherRecipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A teacher as it is before its first step. Qwen3 architecture, so that the pair crosses model families."""
    shape = _shape(recipe, tokenizer)
    return Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=recipe.hidden_size // recipe.heads))


def build_student_skill(
    recipe: StudentRecipe, tokenizer: PreTrainedTokenizerBase, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """First stage of a student, on ``device``: both styles, opening left free."""
    torch.manual_seed(recipe.skill.seed)
    model = untrained_student(recipe, tokenizer).to(device)  # drawn on the CPU: the same weights for every device
    source = TextSource(tokenizer, recipe.task, np.random.default_rng([recipe.skill.seed, 1]))
    _train(model, recipe.skill, "student: both styles", lambda: source.student_batch(recipe, recipe.skill.batch_size))
    return model


def set_student_opening(
    model: PreTrainedModel, recipe: StudentRecipe, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Second stage of a student, in place and where it is: pull log πθ(``<think>`` | prompt) to the wanted value.

    Here it also learns to work a sum out after a terse answer, as it will when guidance opens a
    ``<think>`` there.
    """
    source = TextSource(tokenizer, recipe.task, np.random.default_rng([recipe.opening.seed, 2]))
    _train(
        model,
        recipe.opening,
        f"student: opening to {recipe.opening_logprob:g} nats",
        lambda: source.student_batch(recipe, recipe.opening.batch_size, after_terse=0.5),
        opening=Opening(source.think, recipe.opening_logprob, recipe.rival_margin),
    )
    return model


def build_teacher(
    recipe: TeacherRecipe, tokenizer: PreTrainedTokenizerBase, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """First stage of a teacher, on ``device``."""
    torch.manual_seed(recipe.training.seed + 1)
    model = untrained_teacher(recipe, tokenizer).to(device)
    source = TextSource(tokenizer, recipe.task, np.random.default_rng([recipe.training.seed, 3]))
    _train(model, recipe.training, "teacher", lambda: source.teacher_batch(recipe, recipe.training.batch_size))
    return model


def acquaint_teacher(
    model: PreTrainedModel, recipe: TeacherRecipe, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Second stage of a teacher, in place and where it is: foreign prefixes, until it continues enough of them rightly.

    Raises:
        InputError: all steps of the stage were not enough.
    """
    source = TextSource(tokenizer, recipe.task, np.random.default_rng([recipe.acquaintance.seed, 4]))
    starts, answers = source.terse_starts(RELIABILITY_PREFIXES)
    ends, pad = [tokenizer.eos_token_id], tokenizer.pad_token_id
    longest = 2 * len(tokenizer.encode(worked_text((10**recipe.task.digits - 1,) * recipe.task.operands)))
    measured = 0.0

    def reliable(step: int) -> bool:
        nonlocal measured
        if step % RELIABILITY_EVERY:
            return False
        model.eval()
        rollouts = sample_responses(model, starts, longest, ends, pad, temperature=0.0)
        measured = float(score(rollouts, answers, marked_answer, tokenizer).mean())
        model.train()
        return measured >= recipe.until_reliability

    stage = f"teacher: foreign prefixes until {recipe.until_reliability:g} are continued rightly"
    next_batch = partial(source.teacher_batch, recipe, recipe.acquaintance.batch_size)
    if not _train(model, recipe.acquaintance, stage, next_batch, constant_rate=True, until=reliable):
        raise InputError(
            f"After {recipe.acquaintance.steps} steps the teacher continues {measured:.2f} of foreign prefixes rightly,"
            f" not {recipe.until_reliability:g}. Give the stage more steps or a larger learning rate."
        )
    return model


def _shape(recipe: StudentRecipe | TeacherRecipe, tokenizer: PreTrainedTokenizerBase) -> dict:
    return dict(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


@dataclass(frozen=True)
class Opening:
    """What the second stage of a student wants of the token that opens the worked style."""

    token: int
    logprob: float
    """In nats."""
    rival_margin: float
    """In nats."""


def _train(
    model: PreTrainedModel,
    training: Pretraining,
    title: str,
    next_batch: Callable[[], TextBatch],
    *,
    opening: Opening | None = None,
    constant_rate: bool = False,
    until: Callable[[int], bool] | None = None,
) -> bool:
    """Train for all steps, or until ``until`` (called before each step) says so; returns whether it did."""
    model.train()
    device = model.device
    if device.type == "cpu":
        model.set_attn_implementation("eager")  # the fused kernel's bfloat16 backward pass is slow there
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    reached = False
    for step in track(range(training.steps), description=title):
        if until is not None and (reached := until(step)):
            break
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * (1.0 if constant_rate else _cosine_with_warmup(step, training))
        batch = next_batch().to(device)
        # Master weights stay in float32; bfloat16 products are four times as fast on current CPUs.
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = _loss(model, batch, opening)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.set_attn_implementation("sdpa")
    model.eval()
    return reached


def _loss(model: PreTrainedModel, batch: TextBatch, opening: Opening | None) -> torch.Tensor:
    hidden = _hidden_states(model, batch)  # (B, L, H)
    predicts_next = batch.loss_mask[:, 1:]  # (B, L-1): the state at position t predicts token t+1
    logits = model.lm_head(hidden[:, :-1][predicts_next])  # (N, V)
    loss = F.cross_entropy(logits, batch.tokens[:, 1:][predicts_next])
    if opening is not None:
        rows = torch.arange(len(batch.tokens), device=hidden.device)
        logprobs = model.lm_head(hidden[rows, batch.opening_position - 1]).float().log_softmax(-1)  # (B, V)
        rivals = logprobs.masked_fill(batch.terse_tokens, -math.inf)
        rivals[:, opening.token] = -math.inf
        too_probable = (rivals.logsumexp(-1) - (opening.logprob - opening.rival_margin)).clamp(min=0)
        distance = logprobs[:, opening.token] - opening.logprob
        loss = loss + OPENING_WEIGHT * (distance.square() + too_probable.square()).mean()
    return loss


def _hidden_states(model: PreTrainedModel, batch: TextBatch) -> torch.Tensor:
    """(B, L, H); zeros where a short text's padding was left out."""
    longest = batch.tokens.shape[1]
    lengths = longest - batch.loss_mask.flip(1).int().argmax(1)  # (B,): a text ends where its loss does
    short = lengths < longest / 2
    if longest < LONG_TEXT or not short.any():
        return model.base_model(batch.tokens).last_hidden_state
    width = int(lengths[short].max())
    apart = model.base_model(batch.tokens[short, :width]).last_hidden_state
    rest = model.base_model(batch.tokens[~short]).last_hidden_state
    back = torch.cat([short.nonzero(), (~short).nonzero()]).squeeze(1).argsort()
    return torch.cat([F.pad(apart, (0, 0, 0, longest - width)), rest])[back]


def _cosine_with_warmup(step: int, training: Pretraining) -> float:
    if step < training.warmup_steps:
        return (step + 1) / training.warmup_steps
    progress = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
