"""What student and teacher say at every token of some rollouts, and what each method would do there.

Every number that the guidance explorer shows is computed here, with the losses that training uses and without a
browser.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import InputError
from ..guidance import apply_gate
from ..losses import entropy, group_advantages, reverse_kl_advantage, token_logprobs
from ..methods import TGPO, make_method
from ..micro_batches import split_rows
from ..models.pairs import Pair
from ..models.policy import most_probable, positions_at_once, project_to_vocabulary, response_hidden_states
from ..rollouts import Rollouts
from ..teacher import ask_teacher
from .logit_updates import UPDATE_METHODS, logit_updates
from .token_text import visible_text

# An update holds about so many (N, V) tensors at once where a forward pass holds one.
TENSORS_PER_UPDATE = 8


@dataclass(frozen=True)
class GuidanceView:
    """Numbers of B rollouts of T positions; zero at padding. Log-probabilities and entropies are in nats."""

    rollouts: Rollouts
    temperature: float
    """The policy is the softmax of the student's logits divided by it."""
    guidance_weight: float
    """w of TGPO."""
    advantages: Tensor
    """(B,) group advantage A of each response."""
    student_logprobs: Tensor
    """(B, T) log πθ(y_t) of the token that was written."""
    teacher_logprobs: Tensor
    """(B, T) log πT(y_t)."""
    student_entropy: Tensor
    """(B, T)."""
    teacher_entropy: Tensor
    """(B, T)."""
    student_best: Tensor
    """(B, T) int64, the student's most probable token."""
    teacher_best: Tensor
    """(B, T) int64, the teacher's most probable token, its proposal."""
    student_top_tokens: Tensor
    """(B, T, K) int64, the student's K most probable tokens."""
    student_top_logprobs: Tensor
    """(B, T, K)."""
    teacher_top_tokens: Tensor
    """(B, T, K) int64."""
    teacher_top_logprobs: Tensor
    """(B, T, K)."""
    student_ranks: Tensor
    """(B, T) int64, rank of the written token among the student's, 1 for its most probable one."""
    teacher_ranks: Tensor
    """(B, T) int64, its rank among the teacher's."""
    student_proposal_logprobs: Tensor
    """(B, T) log πθ of the teacher's proposal."""
    student_proposal_ranks: Tensor
    """(B, T) int64, rank of the teacher's proposal among the student's tokens."""
    updates: Mapping[str, Tensor]
    """Method → (B, T, 1 + 2K): its update at :attr:`listed_tokens`."""
    weights: Mapping[str, Tensor]
    """Method → (B, T): the norm of its update, negative where the update lowers the written token's logit."""

    @property
    def listed_tokens(self) -> Tensor:
        """(B, T, 1 + 2K) int64: the written token, the student's K and the teacher's K most probable; some repeat."""
        written = self.rollouts.responses.unsqueeze(-1)
        return torch.cat([written, self.student_top_tokens, self.teacher_top_tokens], -1)

    @property
    def token_rewards(self) -> Tensor:
        """(B, T) reward of reverse KL for each token, log πT(y_t) − log πθ(y_t)."""
        return reverse_kl_advantage(self.student_logprobs, self.teacher_logprobs)

    @property
    def agreement(self) -> Tensor:
        """(B, T) bool: student and teacher have the same most probable token."""
        return (self.student_best == self.teacher_best) & self.rollouts.mask

    @property
    def differs(self) -> Tensor:
        """(B, T) bool: the teacher would write another token than the one written."""
        return (self.rollouts.responses != self.teacher_best) & self.rollouts.mask

    def quantities(self) -> dict[str, Tensor]:
        """Name → (B, T): what tokens can be coloured by, see :data:`tgpo_lab.widgets.quantities.QUANTITIES`."""
        return {
            "token_reward": self.token_rewards,
            "student_surprise": -self.student_logprobs,
            "teacher_surprise": -self.teacher_logprobs,
            "student_entropy": self.student_entropy,
            "teacher_entropy": self.teacher_entropy,
            "agreement": self.agreement.to(self.student_logprobs.dtype),
            **{f"weight_{name.replace('-', '_')}": values for name, values in self.weights.items()},
        }

    def frame(self, pair: Pair, row: int, positions: list[int] | None = None) -> pd.DataFrame:
        """Tokens of one response as a table.

        Args:
            pair: brings the tokenizer.
            row: which response.
            positions: which tokens, from 0; by default all.

        Returns:
            One row a token: ``position``, ``token_id``, ``token``, ``proposal_id``, ``proposal``,
            ``student_logprob``, ``teacher_logprob`` (nats), ``student_rank``, ``teacher_rank`` (1 is the most
            probable token), ``proposal_student_logprob``, ``proposal_student_rank`` and the columns of
            :meth:`quantities`.

        Raises:
            InputError: the row or a position does not exist.
        """
        if not 0 <= row < len(self.rollouts):
            raise InputError(f"There is no response {row}: there are {len(self.rollouts)}, counted from 0.")
        length = int(self.rollouts.lengths[row])
        positions = list(range(length)) if positions is None else list(positions)
        if wrong := [p for p in positions if not 0 <= p < length]:
            raise InputError(f"There is no token {wrong[0]} in this response: it has {length}, counted from 0.")
        written, proposed = (values[row, positions].tolist() for values in (self.rollouts.responses, self.teacher_best))
        numbers = {
            "student_logprob": self.student_logprobs,
            "teacher_logprob": self.teacher_logprobs,
            "student_rank": self.student_ranks,
            "teacher_rank": self.teacher_ranks,
            "proposal_student_logprob": self.student_proposal_logprobs,
            "proposal_student_rank": self.student_proposal_ranks,
            **self.quantities(),
        }
        columns = {name: values[row, positions].tolist() for name, values in numbers.items()}
        columns["agreement"] = [bool(value) for value in columns["agreement"]]
        return pd.DataFrame(
            {
                "position": positions,
                "token_id": written,
                "token": [visible_text(pair.tokenizer, token) for token in written],
                "proposal_id": proposed,
                "proposal": [visible_text(pair.tokenizer, token) for token in proposed],
                **columns,
            }
        )


def advantages_by_prompt(rollouts: Rollouts, rewards: Tensor) -> Tensor:
    """Group advantages where neighbouring rows with one prompt are a group: (B,) → (B,).

    As in GRPO, (r − mean)/std. A response without another to its prompt has nothing to be compared with and gets 0.
    """
    parts, start = [], 0
    for _, same_prompt in groupby(rollouts.prompts):
        size = len(list(same_prompt))
        group = rewards[start : start + size]
        parts.append(group_advantages(group, size) if size > 1 else torch.zeros_like(group))
        start += size
    return torch.cat(parts)


@torch.no_grad()
def view_guidance(
    pair: Pair,
    rollouts: Rollouts,
    *,
    model: PreTrainedModel | None = None,
    advantages: Tensor | None = None,
    temperature: float = 1.0,
    method: TGPO | None = None,
    guidance_weight: float | None = None,
    top_k: int = 8,
    micro_batch_tokens: int = 16384,
) -> GuidanceView:
    """Ask student and teacher about every token of some rollouts, whoever wrote them.

    Args:
        pair: brings the teacher, and the student unless ``model`` is given.
        rollouts: B rows of T response positions.
        model: the student to look at, in evaluation mode, on the teacher's device.
        advantages: (B,) group advantages, zeros by default; see :func:`advantages_by_prompt`.
        temperature: divides the student's logits; 0 (greedy) is looked at as 1.
        method: TGPO with its gate; by default that of the tiny world. Guidance is by the teacher's best token.
        guidance_weight: w; by default the method's at step 0.
        top_k: K of the two lists.
        micro_batch_tokens: at most so many tokens, padding included, go through a model at once.

    Raises:
        InputError: K is impossible, or the temperature is below 0.
    """
    if not 1 <= top_k <= pair.vocabulary_size:
        raise InputError(f"top_k must be from 1 to the {pair.vocabulary_size} tokens of the pair, but is {top_k}.")
    if not temperature >= 0:
        raise InputError(f"temperature must be 0 (greedy) or more, but is {temperature}.")
    model, method = model or pair.student, method or make_method("tgpo", tiny=True)
    temperature = temperature or 1.0
    weight = method.weight(0) if guidance_weight is None else guidance_weight
    device, shape = rollouts.responses.device, rollouts.mask.shape
    if advantages is None:
        advantages = torch.zeros(len(rollouts))
    advantages = advantages.to(device, torch.float32)
    answers = ask_teacher(
        pair.teacher,
        rollouts,
        vocabulary_size=pair.vocabulary_size,
        micro_batch_tokens=micro_batch_tokens,
        keep_distribution=rollouts.mask,
        top_k=top_k,
    )
    gate = apply_gate(
        method.gate,
        method.gate_threshold,
        rollouts.responses,
        answers,
        doubt=method.doubt,
        memory=method.doubt_memory,
        soft=method.soft_horizon,
    )

    def numbers(*last: int) -> Tensor:
        return torch.zeros(*shape, *last, device=device)

    view = GuidanceView(
        rollouts=rollouts,
        temperature=temperature,
        guidance_weight=weight,
        advantages=advantages,
        student_logprobs=numbers(),
        teacher_logprobs=answers.logprobs,
        student_entropy=numbers(),
        teacher_entropy=numbers(),
        student_best=torch.zeros_like(rollouts.responses),
        teacher_best=answers.tokens,
        student_top_tokens=numbers(top_k).long(),
        student_top_logprobs=numbers(top_k),
        teacher_top_tokens=answers.top_tokens,
        teacher_top_logprobs=answers.top_logprobs,
        student_ranks=numbers().long(),
        teacher_ranks=numbers().long(),
        student_proposal_logprobs=numbers(),
        student_proposal_ranks=numbers().long(),
        updates={name: numbers(1 + 2 * top_k) for name in UPDATE_METHODS},
        weights={name: numbers() for name in UPDATE_METHODS},
    )
    size = max(1, positions_at_once(pair.vocabulary_size, device) // TENSORS_PER_UPDATE)
    for rows in split_rows(rollouts, micro_batch_tokens):
        part = rollouts.rows(rows)
        part_row, part_step = part.mask.nonzero(as_tuple=True)
        states = response_hidden_states(model, part)
        chunks = zip(states.split(size), rows[part_row].split(size), part_step.split(size), strict=True)
        for hidden, row, step in chunks:
            logits = project_to_vocabulary(model, hidden, pair.vocabulary_size) / temperature  # (N, V)
            kept = answers.hidden[answers.hidden_index[row, step]]
            teacher = project_to_vocabulary(pair.teacher, kept, pair.vocabulary_size)  # (N, V)
            written, proposed = rollouts.responses[row, step], answers.tokens[row, step]
            view.student_logprobs[row, step] = token_logprobs(logits, written)
            view.student_entropy[row, step] = entropy(logits)
            view.teacher_entropy[row, step] = entropy(teacher)
            view.student_best[row, step] = most_probable(logits)
            top = logits.log_softmax(-1).topk(top_k)
            view.student_top_logprobs[row, step], view.student_top_tokens[row, step] = top
            view.student_ranks[row, step] = _ranks(logits, written)
            view.teacher_ranks[row, step] = _ranks(teacher, written)
            view.student_proposal_logprobs[row, step] = token_logprobs(logits, proposed)
            view.student_proposal_ranks[row, step] = _ranks(logits, proposed)
            listed = view.listed_tokens[row, step]
            guidance = weight * gate[row, step]
            moves = logit_updates(logits, teacher, written, advantages[row], guidance, proposed)
            for name, move in moves.items():
                view.updates[name][row, step] = move.gather(-1, listed)
                direction = move.gather(-1, written.unsqueeze(-1)).squeeze(-1)
                view.weights[name][row, step] = move.norm(dim=-1).copysign(direction)
    return view


def _ranks(logits: Tensor, tokens: Tensor) -> Tensor:
    """Ranks of (N,) tokens among the (N, V) logits, 1 for the largest."""
    return 1 + (logits > logits.gather(-1, tokens.unsqueeze(-1))).sum(-1)
