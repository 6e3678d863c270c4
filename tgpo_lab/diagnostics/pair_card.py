"""Measuring a pair before any training: how far apart the two are, and whether the teacher can be asked.

The two dials of the lab, both measured and never assumed:

* DIVERGENCE: log-probability of the teacher's opening under the student, KL both ways on the
  student's rollouts, share of tokens the teacher rejects, top-1 agreement;
* TEACHER RELIABILITY: the share of the student's own prefixes, by depth, from which the teacher
  goes on to a right answer. It is the premise that teacher guidance rests on.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass

import torch
from datasets import Dataset

from ..evaluation import evaluate, pair_prompts
from ..losses import entropy, forward_kl_per_token, reverse_kl_per_token, token_logprobs
from ..micro_batches import split_rows
from ..models.pairs import Pair, require_room
from ..models.policy import most_probable, positions_at_once, project_to_vocabulary, response_hidden_states
from ..rollouts import Rollouts
from ..sampling.cached_sampling import sample_responses
from .premise import DEPTHS, continue_from, premise_by_depth


@dataclass(frozen=True)
class PairCard:
    """Measured figures of a pair. Accuracies and shares are from 0 to 1, divergences in nats per token."""

    pair: str
    prompts: int
    """Number of held-out prompts the figures come from."""
    student_accuracy: float
    """Of the student's greedy responses."""
    student_accuracy_sampled: float
    """At temperature 1."""
    teacher_accuracy: float
    """Of the teacher's greedy responses."""
    student_length: float
    """Tokens of a sampled response of the student."""
    teacher_length: float
    """Tokens of a greedy response of the teacher."""
    opening: str
    """The token with which the teacher most often opens its response."""
    opening_logprob: float
    """Mean log-probability of the teacher's opening token under the student, in nats."""
    forced_opening_accuracy: float
    """Accuracy of the student's greedy continuation once that token is put before it."""
    reverse_kl: float
    """KL(student‖teacher) per token on the student's samples."""
    forward_kl: float
    """KL(teacher‖student) per token on the student's samples."""
    student_entropy: float
    """Mean entropy of the student on its samples."""
    rejected: float
    """Share of sampled tokens that the teacher finds less probable by more than ``rejection_threshold`` nats."""
    agreement: float
    """Share of positions at which both have the same most probable token."""
    reliability: float
    """Share of all the student's prefixes tried from which the teacher goes on to a right answer."""
    reliability_by_depth: dict[str, float]
    """The same by the number of tokens in the prefix."""
    prefixes_by_depth: dict[str, int]
    """How many prefixes were tried at each depth."""
    student_cut: float | None = None
    """Share of the student's sampled responses that were cut, and count as wrong; older cards do not have it."""
    teacher_cut: float | None = None
    """The same of the teacher's greedy responses."""

    def as_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


@torch.no_grad()
def measure_pair(
    pair: Pair,
    prompts: Dataset | None = None,
    *,
    count: int = 128,
    max_new_tokens: int = 80,
    reward: str = "marked_answer",
    rejection_threshold: float = 4.0,
    seed: int = 0,
) -> PairCard:
    """Measure a pair on held-out prompts.

    Args:
        pair: any pair.
        prompts: rows with ``prompt`` and ``answer``; by default the test split of the pair's own.
        count: the first so many of them.
        max_new_tokens: responses are cut after so many tokens.
        reward: name of the reward.
        rejection_threshold: nats, as in a run.
        seed: decides the samples.

    Raises:
        InputError: the pair brings no prompts and none are given, or they are too long for its models.
    """
    prompts = pair_prompts(pair, "test") if prompts is None else prompts
    prompts = prompts.select(range(min(count, len(prompts))))
    require_room_to_measure(pair, prompts, max_new_tokens)
    common = {"prompts": prompts, "max_new_tokens": max_new_tokens, "reward": reward, "seed": seed}
    greedy = evaluate(pair, **common)
    sampled = evaluate(pair, temperature=1.0, **common)
    taught = evaluate(pair, pair.teacher, **common)

    encoded = pair.encode(prompts["prompt"])
    opening, opening_logprob, forced = _opening(pair, encoded, prompts, max_new_tokens, reward)
    premise = premise_by_depth(pair, sampled, prompts, max_new_tokens=max_new_tokens, reward=reward)
    by_depth = premise.groupby("depth")["teacher_right"]
    return PairCard(
        pair=pair.name,
        prompts=len(prompts),
        student_accuracy=greedy.accuracy,
        student_accuracy_sampled=sampled.accuracy,
        teacher_accuracy=taught.accuracy,
        student_length=sampled.length,
        teacher_length=taught.length,
        opening=opening,
        opening_logprob=opening_logprob,
        forced_opening_accuracy=forced,
        **_divergence(pair, sampled.rollouts, rejection_threshold),
        reliability=float(premise["teacher_right"].mean()),
        reliability_by_depth={str(depth): float(share) for depth, share in by_depth.mean().items()},
        prefixes_by_depth={str(depth): int(count) for depth, count in by_depth.count().items()},
        student_cut=sampled.truncated,
        teacher_cut=taught.truncated,
    )


def require_room_to_measure(pair: Pair, prompts: Dataset, max_new_tokens: int) -> None:
    """Refuse prompts that are too long to measure a pair on.

    Raises:
        InputError: they are; see :func:`tgpo_lab.models.pairs.require_room`.
    """
    # Prefixes of responses are continued, and those with the teacher's next token.
    require_room(pair, prompts["prompt"], max_new_tokens, prefix=min(max(DEPTHS) + 1, max_new_tokens))


def _opening(
    pair: Pair, encoded: list[list[int]], prompts: Dataset, max_new_tokens: int, reward: str
) -> tuple[str, float, float]:
    """The teacher's usual first token, its log-probability under the student, accuracy once it is forced."""
    first = sample_responses(
        pair.teacher, encoded, 1, pair.end_tokens, pair.pad_token,
        temperature=0.0, vocabulary_size=pair.vocabulary_size,
    )  # fmt: skip
    tokens = first.responses[:, 0].tolist()
    student = project_to_vocabulary(
        pair.student, response_hidden_states(pair.student, first), pair.vocabulary_size
    ).log_softmax(-1)  # (prompts, V)
    logprob = float(student[torch.arange(len(tokens)), first.responses[:, 0]].mean())
    forced = continue_from(
        pair, pair.student, encoded, [[token] for token in tokens], list(prompts["answer"]),
        max_new_tokens=max_new_tokens, reward=reward,
    )  # fmt: skip
    usual = Counter(tokens).most_common(1)[0][0]
    return pair.tokenizer.decode([usual]), logprob, sum(forced) / len(forced)


def _divergence(pair: Pair, rollouts: Rollouts, threshold: float) -> dict[str, float]:
    """Divergence on the student's own samples, at every position."""
    names = ("reverse_kl", "forward_kl", "student_entropy", "rejected", "agreement")
    sums = dict.fromkeys(names, 0.0)
    for rows in split_rows(rollouts, 8192):
        part = rollouts.rows(rows)
        states = [response_hidden_states(model, part) for model in (pair.student, pair.teacher)]  # (N, H) each
        size = positions_at_once(pair.vocabulary_size, states[0].device)
        chunks = zip(*(s.split(size) for s in states), part.responses[part.mask].split(size), strict=True)
        for student_states, teacher_states, written in chunks:
            student, teacher = (
                project_to_vocabulary(model, hidden, pair.vocabulary_size).unsqueeze(0)
                for model, hidden in ((pair.student, student_states), (pair.teacher, teacher_states))
            )  # (1, positions at once, V)
            values = (
                reverse_kl_per_token(student, teacher),
                forward_kl_per_token(student, teacher),
                entropy(student),
                token_logprobs(student[0], written) - token_logprobs(teacher[0], written) > threshold,  # d_t
                most_probable(student[0]) == most_probable(teacher[0]),
            )
            for name, value in zip(names, values, strict=True):
                sums[name] += float(value.sum())
    return {name: value / int(rollouts.mask.sum()) for name, value in sums.items()}


def card_markdown(card: PairCard, summary: str = "") -> str:
    """The card as Markdown, for a README and the terminal."""
    rows = [
        (
            "Accuracy of the student, greedy / sampled",
            f"{card.student_accuracy:.3f} / {card.student_accuracy_sampled:.3f}",
        ),
        ("Accuracy of the teacher, greedy", f"{card.teacher_accuracy:.3f}"),
        (
            f"Log-probability of the teacher's opening `{card.opening}` under the student",
            f"{card.opening_logprob:.2f} nats",
        ),
        ("Accuracy of the student after that opening is forced", f"{card.forced_opening_accuracy:.3f}"),
        ("KL(student‖teacher) on student rollouts", f"{card.reverse_kl:.2f} nats per token"),
        ("KL(teacher‖student) on student rollouts", f"{card.forward_kl:.2f} nats per token"),
        ("Entropy of the student on its rollouts", f"{card.student_entropy:.2f} nats per token"),
        ("Tokens rejected by the teacher", f"{card.rejected:.3f}"),
        ("Top-1 agreement", f"{card.agreement:.3f}"),
        ("Teacher reliability on student prefixes", f"{card.reliability:.3f}"),
        ("… by depth in tokens", ", ".join(f"{d}: {r:.2f}" for d, r in card.reliability_by_depth.items())),
        ("Length of a response, student / teacher", f"{card.student_length:.1f} / {card.teacher_length:.1f} tokens"),
    ]
    if card.student_cut is not None and card.teacher_cut is not None:
        rows.append(("Responses that were cut, student / teacher", f"{card.student_cut:.2f} / {card.teacher_cut:.2f}"))
    lines = [f"# Pair: {card.pair}", "", *([summary, ""] if summary else []), "| Measured | Value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    lines += ["", f"Measured on {card.prompts} held-out prompts."]
    return "\n".join(lines) + "\n"
