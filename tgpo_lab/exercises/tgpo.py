"""Exercises of notebook 08."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses import forward_kl_per_token, guidance_loss, masked_sum, token_logprobs
from ..schedules import LinearDecay
from .checking import Exercise, Told, gradient_of


def _batches() -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    random = torch.Generator().manual_seed(8)
    cases = []
    for rows, lengths in ((2, [3, 5]), (3, [4, 1, 4])):
        longest, vocabulary = max(lengths), 6
        student = torch.randn(rows, longest, vocabulary, generator=random)
        teacher = 2 * torch.randn(rows, longest, vocabulary, generator=random)
        tokens = torch.randint(vocabulary, (rows, longest), generator=random)
        cases.append((student, teacher, tokens, torch.arange(longest) < torch.tensor(lengths).unsqueeze(-1)))
    return cases


def _value_and_gradients(function, student_logits, teacher_logits, tokens, mask):
    """The loss and its gradients by both logits; zeros where none flows."""
    leaves = [student_logits.clone().requires_grad_(), teacher_logits.clone().requires_grad_()]
    value = function(*(leaf.clone() for leaf in leaves), tokens, mask)
    if isinstance(value, float | int):
        raise Told("Your loss is a plain number: return the tensor, so that it can be differentiated.")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise Told(f"Your function returned the shape {tuple(value.shape)}: return one scalar, not a value a position.")
    if not isinstance(value, Tensor):
        return value
    return value.detach().reshape(()), *(gradient_of(value, leaf) for leaf in leaves)


def _guidance(student_logits, teacher_logits, tokens, mask):
    return guidance_loss(student_logits, teacher_logits.argmax(-1), mask)


def _shifted(student_logits, teacher_logits, tokens, mask):
    return guidance_loss(student_logits[:, :-1], teacher_logits[:, 1:].argmax(-1), mask[:, 1:])


def _whole_distribution(student_logits, teacher_logits, tokens, mask):
    crossed = -(teacher_logits.softmax(-1) * student_logits.log_softmax(-1)).sum(-1)
    return masked_sum(crossed, mask)


def _padding_in_mean(student_logits, teacher_logits, tokens, mask):
    return guidance_loss(student_logits, teacher_logits.argmax(-1), mask, normalizer=mask.numel())


def _without_mask(student_logits, teacher_logits, tokens, mask):
    return guidance_loss(student_logits, teacher_logits.argmax(-1), torch.ones_like(mask))


def _summed(student_logits, teacher_logits, tokens, mask):
    return guidance_loss(student_logits, teacher_logits.argmax(-1), mask, normalizer=1)


def _mean_of_means(student_logits, teacher_logits, tokens, mask):
    losses = -token_logprobs(student_logits, teacher_logits.argmax(-1))
    return (torch.where(mask, losses, 0.0).sum(-1) / mask.sum(-1)).mean()


def _where_they_differ(student_logits, teacher_logits, tokens, mask):
    best = teacher_logits.argmax(-1)
    return guidance_loss(student_logits, best, mask & (tokens != best))


def _students_own(student_logits, teacher_logits, tokens, mask):
    return guidance_loss(student_logits, student_logits.argmax(-1), mask)


def _forward_kl_detached(student_logits, teacher_logits, tokens, mask):
    return masked_sum(forward_kl_per_token(student_logits, teacher_logits.detach()), mask)


def _soft_labels_detached(student_logits, teacher_logits, tokens, mask):
    return _whole_distribution(student_logits, teacher_logits.detach(), tokens, mask)


def _raw_logits(student_logits, teacher_logits, tokens, mask):
    chosen = student_logits.gather(-1, teacher_logits.argmax(-1, keepdim=True)).squeeze(-1)
    return -masked_sum(chosen, mask)


def _teachers_score(student_logits, teacher_logits, tokens, mask):
    return guidance_loss(teacher_logits, teacher_logits.argmax(-1), mask)


def _forward_kl(student_logits, teacher_logits, tokens, mask):
    return masked_sum(forward_kl_per_token(student_logits, teacher_logits), mask)


def _unlocking(tokens, teacher_tokens, right_after):
    found = (tokens != teacher_tokens) & right_after
    return torch.where(found.any(-1), found.int().argmax(-1), -1)


def _responses() -> list[tuple[Tensor, Tensor, Tensor]]:
    written = torch.tensor([[5, 2, 7, 1], [3, 3, 3, 0], [4, 1, 6, 0], [8, 8, 2, 0]])
    proposed = torch.tensor([[5, 9, 9, 9], [9, 3, 9, 0], [4, 1, 6, 0], [8, 8, 9, 0]])
    right = torch.tensor([[1, 0, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]]).bool()
    return [(written, proposed, right), (written[:2], proposed[:2], ~right[:2])]


def _last(tokens, teacher_tokens, right_after):
    found = (tokens != teacher_tokens) & right_after
    places = torch.arange(tokens.shape[1])
    return torch.where(found, places, -1).amax(-1)


def _steps() -> list[tuple[int, float, float, float]]:
    return [(step, 2e-3, 1e-5, 0.0) for step in (0, 100, 300)] + [(step, 5e-3, 5e-5, 1e-3) for step in (60, 90)]


EXERCISES = (
    Exercise(
        "08.1",
        "guidance from two models' logits",
        _guidance,
        _batches,
        {
            "You taught the tokens that the student sampled; guidance teaches the teacher's most probable ones.": (
                lambda student, teacher, tokens, mask: guidance_loss(student, tokens, mask)
            ),
            "The teacher's tokens are shifted by one against the student's logits. Both are aligned already: "
            "position t of each predicts token t.": _shifted,
            "This is the sum over tokens; divide by the number of unmasked tokens.": _summed,
            "Padding counts in the mean: divide by the number of unmasked tokens, not by B·T.": _padding_in_mean,
            "The mask is not used: positions after the end of a response are taught as well.": _without_mask,
            "This is a mean over each response first: divide once, by all unmasked tokens.": _mean_of_means,
            "Places at which the student wrote the teacher's token already are left out; the mean is over all unmasked "
            "places, whatever was written there.": _where_they_differ,
            "You taught the student's own most probable token; take the argmax of the teacher's logits.": _students_own,
            "You scored the teacher's tokens under the teacher itself; the loss is about log πθ, the student's.": (
                _teachers_score
            ),
            "This is the cross-entropy against the teacher's whole distribution, and a gradient flows into the "
            "teacher. Take its most probable token alone.": _whole_distribution,
            "This uses the teacher's whole distribution (its cross-entropy or the forward KL). Take its most probable "
            "token alone.": (_forward_kl, _forward_kl_detached, _soft_labels_detached),
            "log_softmax is missing: these are logits, not log-probabilities.": _raw_logits,
            "No gradient reaches the student's logits: something is detached that must not be.": (
                lambda *arguments: _guidance(*arguments).detach()
            ),
            "The sign is the wrong way round: the loss is minus the log-probability.": (
                lambda *arguments: -_guidance(*arguments)
            ),
        },
        observe=_value_and_gradients,
        observed="your loss and its gradients by both models' logits",
        parts=("loss", "gradient by the student's logits", "gradient by the teacher's logits"),
    ),
    Exercise(
        "08.2",
        "which position unlocks the answer",
        _unlocking,
        _responses,
        {
            "Positions at which the student wrote the teacher's token already are counted too; nothing is changed "
            "there.": lambda tokens, teacher, right: torch.where(right.any(-1), right.int().argmax(-1), -1),
            "You looked at the positions where the student wrote the teacher's token; look at the others.": (
                lambda tokens, teacher, right: _unlocking(
                    tokens + (tokens != teacher), tokens, right & (tokens == teacher)
                )
            ),
            "This is the last such position; the first one is asked for.": _last,
            "A response without such a position gave 0, which is a position. Give −1 there.": (
                lambda tokens, teacher, right: ((tokens != teacher) & right).int().argmax(-1)
            ),
            "This is the first disagreement, whether or not the answer is right after it.": (
                lambda tokens, teacher, right: _unlocking(tokens, teacher, torch.ones_like(right))
            ),
            "One too far: the position is that of the token which is replaced, counted from 0.": (
                lambda *arguments: torch.where(_unlocking(*arguments) < 0, -1, _unlocking(*arguments) + 1)
            ),
        },
    ),
    Exercise(
        "08.3",
        "a linear schedule with a floor",
        lambda step, initial, rate, floor: LinearDecay(initial, rate, floor)(step),
        _steps,
        {
            "The floor is missing: the weight goes below it, and a weight below 0 would push the student away from the "
            "teacher.": lambda step, initial, rate, floor: initial - rate * step,
            "Floored at 0; the floor is an argument.": (
                lambda step, initial, rate, floor: max(initial - rate * step, 0.0)
            ),
            "This is the smaller of the line and the floor; take the larger.": (
                lambda step, initial, rate, floor: min(initial - rate * step, floor)
            ),
            "The floor is added to the line; it only stops the line from falling further.": (
                lambda step, initial, rate, floor: max(initial - rate * step, 0.0) + floor
            ),
            "The rate is what is subtracted at each step, not a share of the initial weight.": (
                lambda step, initial, rate, floor: max(initial * (1 - rate * step), floor)
            ),
        },
        tolerance=1e-9,
    ),
)
