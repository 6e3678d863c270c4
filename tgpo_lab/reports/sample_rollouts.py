"""Annotated rollouts: what a student writes, token by token, with what the teacher says to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..errors import InputError
from ..explorer.guidance_view import view_guidance
from ..explorer.token_text import visible_text
from ..models.pairs import Pair
from ..randomness import generator_for
from ..sampling.cached_sampling import sample_responses
from ..tasks.rewards import reward_function, score


@dataclass(frozen=True)
class AnnotatedToken:
    """One token of a response."""

    text: str
    """Its text, with spaces, newlines and other invisible characters made visible."""
    student_logprob: float
    """log πθ(y_t) in nats."""
    teacher_logprob: float
    """log πT(y_t) in nats."""
    proposal: str
    """The teacher's most probable token at this place, made visible likewise."""
    differs: bool
    """Whether that is another token than the one written."""

    @property
    def difference(self) -> float:
        """d_t = log πθ(y_t) − log πT(y_t) in nats; above 0 the teacher finds the token less probable."""
        return self.student_logprob - self.teacher_logprob


@dataclass(frozen=True)
class AnnotatedRollout:
    """One response, annotated."""

    prompt: str
    answer: str
    """The right answer."""
    tokens: list[AnnotatedToken]
    reward: float
    finished: bool
    """The response ended by itself and was not cut at the token limit."""
    temperature: float
    """Of sampling; 0 is greedy."""


@torch.no_grad()
def annotate(
    pair: Pair,
    model: PreTrainedModel,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    reward: str = "marked_answer",
    micro_batch_tokens: int = 16384,
) -> list[AnnotatedRollout]:
    """Let a student answer prompts, one response each, and ask the teacher about every token.

    As in training, the student's policy is the softmax of its logits divided by the temperature; greedy
    responses are annotated at temperature 1.

    Args:
        pair: brings the teacher and the tokenizer.
        model: the student to look at, in evaluation mode, on the teacher's device.
        prompts: prompt texts.
        answers: the right answer to each.
        max_new_tokens: responses are cut after so many tokens.
        temperature: of sampling; 0 takes the most probable token each time.
        seed: decides the samples.
        reward: name of the reward.
        micro_batch_tokens: at most so many tokens, padding included, go through a model at once.

    Raises:
        InputError: no prompts, another number of answers, a temperature below 0, unknown reward.
    """
    judge = reward_function(reward)
    if not prompts or len(prompts) != len(answers):
        raise InputError(
            f"annotate needs one answer for each prompt and at least one prompt, but got {len(prompts)} prompts "
            f"and {len(answers)} answers."
        )
    if temperature < 0:
        raise InputError(f"temperature must be 0 (greedy) or more, but is {temperature}.")
    rollouts = sample_responses(
        model,
        pair.encode(list(prompts)),
        max_new_tokens,
        pair.end_tokens,
        pair.pad_token,
        temperature=temperature,
        generator=generator_for(seed, "annotated rollouts"),
        vocabulary_size=pair.vocabulary_size,
    )
    view = view_guidance(
        pair, rollouts, model=model, temperature=temperature, top_k=1, micro_batch_tokens=micro_batch_tokens
    )
    rewards = score(rollouts, list(answers), judge, pair.tokenizer)
    annotated = []
    for row, length in enumerate(rollouts.lengths.tolist()):
        columns = (rollouts.responses, view.teacher_best, view.student_logprobs, view.teacher_logprobs)
        written, proposed, student, theirs = (values[row, :length].tolist() for values in columns)
        tokens = [
            AnnotatedToken(
                text=visible_text(pair.tokenizer, token),
                student_logprob=own,
                teacher_logprob=other,
                proposal=visible_text(pair.tokenizer, proposal),
                differs=token != proposal,
            )
            for token, proposal, own, other in zip(written, proposed, student, theirs, strict=True)
        ]
        annotated.append(
            AnnotatedRollout(
                prompts[row], answers[row], tokens, float(rewards[row]), bool(rollouts.finished[row]), temperature
            )
        )
    return annotated
