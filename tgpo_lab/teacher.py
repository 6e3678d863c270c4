"""What the teacher says about rollouts: one forward pass over tokens that already exist, no decoding."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .micro_batches import split_rows
from .models.policy import most_probable, positions_at_once, project_to_vocabulary, response_hidden_states
from .parallel.processes import Processes
from .rollouts import Rollouts
from .sampling.cached_sampling import draw_tokens


@dataclass
class TeacherAnswers:
    """The teacher's answers at every prefix of the rollouts. Values at padding are zero."""

    logprobs: Tensor
    """(B, T) log πT(y_t) of the token that stands in the rollout."""
    tokens: Tensor
    """(B, T) int64, the teacher's most probable token."""
    confidence: Tensor
    """(B, T) log-probability of that token."""
    sampled_tokens: Tensor | None = None
    """(B, T) int64, a token drawn from the teacher, if asked for."""
    top_tokens: Tensor | None = None
    """(B, T, K) int64, the K most probable tokens, if asked for."""
    top_logprobs: Tensor | None = None
    """(B, T, K) their log-probabilities."""
    hidden: Tensor | None = None
    """(kept positions, H) states from which whole distributions are projected again, V values each. They stay where
    the teacher computes; all other tensors are where the rollouts are."""
    hidden_index: Tensor | None = None
    """(B, T) int64, row of ``hidden`` for each position, −1 where none was kept."""

    def write_single_tokens(self, logits: Tensor, row: Tensor, step: Tensor, responses: Tensor) -> Tensor:
        """Put down what logits say of the tokens that stand there and of the most probable ones.

        Args:
            logits: (N, V), without gradient.
            row, step: (N,) int64, where each position stands in (B, T).
            responses: (B, T) int64.

        Returns:
            (N, V) log-probabilities.
        """
        logprobs = logits.log_softmax(-1)
        best = most_probable(logits)
        asked_about = torch.stack([responses[row, step], best], -1)  # (N, 2)
        self.tokens[row, step] = best
        self.logprobs[row, step], self.confidence[row, step] = logprobs.gather(-1, asked_about).unbind(-1)
        return logprobs

    def to(self, device: torch.device) -> TeacherAnswers:
        """The same with everything on ``device`` but the hidden states, which only the teacher can read."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return TeacherAnswers(
            **{n: value if value is None or n == "hidden" else value.to(device) for n, value in values.items()}
        )

    def padded_to(self, shape: torch.Size) -> TeacherAnswers:
        """The same with zeros (−1 in ``hidden_index``) for rows and positions that were not asked about."""
        padded = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None and item.name != "hidden":
                wide = value.new_full((*shape, *value.shape[2:]), -1 if item.name == "hidden_index" else 0)
                wide[: value.shape[0], : value.shape[1]] = value
                value = wide
            padded[item.name] = value
        return TeacherAnswers(**padded)

    def of_all(self, processes: Processes) -> TeacherAnswers:
        """The answers that any process has, each having asked about other rows; ``hidden`` stays where it is."""
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None and not item.name.startswith("hidden"):
                processes.sum(value)
        return self


@torch.no_grad()
def ask_teacher(
    teacher: PreTrainedModel,
    rollouts: Rollouts,
    *,
    vocabulary_size: int,
    micro_batch_tokens: int,
    keep_distribution: Tensor | None = None,
    top_k: int = 0,
    sampling_seed: int | None = None,
    rows: Tensor | None = None,
    states_only: bool = False,
) -> TeacherAnswers:
    """Run the teacher over the rollouts.

    Args:
        teacher: model in evaluation mode.
        rollouts: B rows of T response positions.
        vocabulary_size: V; padded vocabulary rows from this id on are cut away.
        micro_batch_tokens: at most so many tokens, padding included, go through the model at once.
        keep_distribution: (B, T) bool; positions whose whole distribution is needed later. Their
            hidden states are kept, which are far smaller than V log-probabilities.
        top_k: K of the top-k lists; 0 for none.
        sampling_seed: if given, a token is drawn from the teacher at each position.
        rows: (N,) int64; only about these. The others' answers are zero, and −1 in ``hidden_index``.
        states_only: keep the hidden states of ``keep_distribution``, and let whoever projects them later write the
            answers about single tokens (:meth:`TeacherAnswers.write_single_tokens`).
    """
    mask = rollouts.mask
    answers = TeacherAnswers(
        logprobs=torch.zeros(mask.shape, device=mask.device),
        tokens=torch.zeros_like(rollouts.responses),
        confidence=torch.zeros(mask.shape, device=mask.device),
    )
    uniform = None
    if sampling_seed is not None:
        uniform = torch.rand(mask.shape, generator=torch.Generator().manual_seed(sampling_seed)).to(mask.device)
        answers.sampled_tokens = torch.zeros_like(rollouts.responses)
    if top_k:
        answers.top_tokens = torch.zeros(*mask.shape, top_k, dtype=torch.long, device=mask.device)
        answers.top_logprobs = torch.zeros(*mask.shape, top_k, device=mask.device)
    asked = torch.arange(len(rollouts), device=mask.device) if rows is None else rows.to(mask.device)
    kept = 0
    if keep_distribution is not None:
        answers.hidden_index = torch.full(mask.shape, -1, device=mask.device)
        room = int((keep_distribution & mask)[asked].sum())

    for split in split_rows(rollouts.rows(asked), micro_batch_tokens):
        rows = asked[split]
        part = rollouts.rows(rows)
        row_of_part, step = part.mask.nonzero(as_tuple=True)
        row = rows[row_of_part]
        states = response_hidden_states(teacher, part)  # (positions of these rows, H)
        if keep_distribution is not None:
            # At once, not state by state between the logits of two chunks: those would then find no room to reuse.
            if answers.hidden is None:
                answers.hidden = states.new_empty(room, states.shape[-1])
            wanted = keep_distribution[row, step]
            count = int(wanted.sum())
            answers.hidden_index[row[wanted], step[wanted]] = torch.arange(kept, kept + count, device=mask.device)
            answers.hidden[kept : kept + count] = states[wanted]
            kept += count
        if states_only:
            continue
        size = positions_at_once(vocabulary_size, states.device)
        chunks = zip(states.split(size), row.split(size), step.split(size), strict=True)
        for hidden, row, step in chunks:  # N positions; where each stands in (B, T)
            logits = project_to_vocabulary(teacher, hidden, vocabulary_size)  # (N, V)
            logprobs = answers.write_single_tokens(logits, row, step, rollouts.responses)
            if uniform is not None:
                answers.sampled_tokens[row, step] = draw_tokens(logits, uniform[row, step])
            if top_k:
                answers.top_logprobs[row, step], answers.top_tokens[row, step] = logprobs.topk(top_k)
    return answers
