"""The premise of teacher guidance, measured: is the teacher right where the student goes?

Prefixes of the student's own responses are taken at several depths. From each the teacher goes on to the end
(RELIABILITY: how often to a right answer), and the student goes on twice: as it is, and after the one token that the
teacher proposes (the VALUE OF THE TOKEN that guidance would teach it).
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import InputError
from ..evaluation import Evaluation
from ..losses import entropy
from ..models.pairs import Pair
from ..models.policy import positions_at_once, project_to_vocabulary
from ..sampling.cached_sampling import sample_responses
from ..tasks.rewards import reward_function
from ..teacher import ask_teacher

DEPTHS = (1, 2, 4, 8, 16, 32, 64)
"""Tokens of a prefix."""


@torch.no_grad()
def premise_by_depth(
    pair: Pair,
    sampled: Evaluation,
    prompts: Dataset,
    *,
    student: PreTrainedModel | None = None,
    depths: Sequence[int] = DEPTHS,
    max_new_tokens: int = 80,
    reward: str = "marked_answer",
    micro_batch_tokens: int = 4096,
) -> pd.DataFrame:
    """One row for each prefix that was tried.

    Args:
        pair: brings the teacher and the tokenizer.
        sampled: the student's responses, one for each prompt (:func:`tgpo_lab.evaluate` at temperature 1).
        prompts: rows with ``prompt`` and ``answer``, as many and in the same order.
        student: the student that wrote them; by default the pair's.
        depths: lengths of prefixes in tokens, 0 for the prompt alone. A response that is shorter is left out there.
        max_new_tokens: continuations are cut after so many tokens, and then count as wrong.
        reward: how a response is judged.
        micro_batch_tokens: at most so many tokens go through the teacher at once.

    Returns:
        Columns ``row`` (of the prompt), ``depth``, ``teacher_right``, ``student_right``,
        ``student_right_after_token`` (0 or 1), ``teacher_entropy`` (nats) and ``teacher_confidence`` (probability of
        the proposed token) at the prefix, ``prefix_surprise`` (−log πT of the prefix's least probable token, nats; 0
        for no prefix), ``agreement`` (1 where the student wrote the proposed token next).

    Raises:
        InputError: no response is long enough for any depth.
    """
    student = pair.student if student is None else student
    rollouts = sampled.rollouts
    asked = ask_teacher(
        pair.teacher,
        rollouts,
        vocabulary_size=pair.vocabulary_size,
        micro_batch_tokens=micro_batch_tokens,
        keep_distribution=rollouts.mask,
    )
    uncertainty = _teacher_entropy(pair, asked.hidden)
    surprise = (-asked.logprobs).cummax(-1).values  # (B, T)
    frames = []
    for depth in depths:
        rows = (rollouts.lengths > depth).nonzero().squeeze(-1)  # the prefix ends before the response does
        if not len(rows):
            continue
        starts = [rollouts.prompts[row] for row in rows.tolist()]
        prefixes = rollouts.responses[rows, :depth].tolist()
        proposed = asked.tokens[rows, depth]
        answers = [prompts[row]["answer"] for row in rows.tolist()]
        extended = [[*prefix, token] for prefix, token in zip(prefixes, proposed.tolist(), strict=True)]
        options = {"max_new_tokens": max_new_tokens, "reward": reward}
        frames.append(
            pd.DataFrame(
                {
                    "row": rows.tolist(),
                    "depth": depth,
                    "teacher_right": continue_from(pair, pair.teacher, starts, prefixes, answers, **options),
                    "student_right": continue_from(pair, student, starts, prefixes, answers, **options),
                    "student_right_after_token": continue_from(pair, student, starts, extended, answers, **options),
                    "teacher_entropy": uncertainty[asked.hidden_index[rows, depth]].tolist(),
                    "teacher_confidence": asked.confidence[rows, depth].exp().tolist(),
                    "prefix_surprise": surprise[rows, depth - 1].tolist() if depth else 0.0,
                    "agreement": (proposed == rollouts.responses[rows, depth]).float().tolist(),
                }
            )
        )
    if not frames:
        raise InputError(
            f"No response of the student is longer than {min(depths)} tokens, so there is no prefix to continue. "
            "Raise max_new_tokens, or give other prompts."
        )
    return pd.concat(frames, ignore_index=True)


def continue_from(
    pair: Pair,
    model: PreTrainedModel,
    prompts: list[list[int]],
    prefixes: list[list[int]],
    answers: list[str],
    *,
    max_new_tokens: int,
    reward: str,
) -> list[float]:
    """Let a model go on greedily from prompt and prefix; judge prefix and continuation as one response.

    A prefix that ends with an end token is a response already. Returns one reward for each.
    """
    judge = reward_function(reward)
    ended = [bool(prefix) and prefix[-1] in pair.end_tokens for prefix in prefixes]
    open_rows = [row for row, done in enumerate(ended) if not done]
    responses = list(prefixes)
    finished = list(ended)
    if open_rows:
        rollouts = sample_responses(
            model,
            [prompts[row] + prefixes[row] for row in open_rows],
            max_new_tokens,
            pair.end_tokens,
            pair.pad_token,
            temperature=0.0,
            vocabulary_size=pair.vocabulary_size,
        )
        for place, row in enumerate(open_rows):
            responses[row] = prefixes[row] + rollouts.responses[place][rollouts.mask[place]].tolist()
            finished[row] = bool(rollouts.finished[place])
    return [
        judge(pair.tokenizer.decode(response[:-1]), answer) if done else 0.0
        for response, done, answer in zip(responses, finished, answers, strict=True)
    ]


def _teacher_entropy(pair: Pair, hidden: Tensor) -> Tensor:
    """Entropy of the teacher at kept positions: (N, H) → (N,), in nats."""
    size = positions_at_once(pair.vocabulary_size, hidden.device)
    chunks = (project_to_vocabulary(pair.teacher, part, pair.vocabulary_size) for part in hidden.split(size))
    return torch.cat([entropy(logits) for logits in chunks])
