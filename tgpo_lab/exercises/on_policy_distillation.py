"""Exercises of notebook 05."""

from __future__ import annotations

import torch

from ..losses import masked_sum, policy_gradient_loss, reverse_kl_advantage
from .checking import Exercise, Told, gradient_of, loss_and_gradient


def _logprobs_with_padding() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(5)
    student, teacher = (-3 * torch.rand(3, 4, generator=random) for _ in range(2))
    mask = torch.arange(4) < torch.tensor([[4], [2], [1]])
    return [(student, teacher, mask), (student[:1], teacher[:1], mask[:1])]


def _gradient(function, logprobs, teacher_logprobs, mask):
    return loss_and_gradient(function, logprobs, teacher_logprobs, mask)[1]


def _reference(logprobs, teacher_logprobs, mask):
    return -masked_sum(reverse_kl_advantage(logprobs, teacher_logprobs) * logprobs, mask)


def _not_detached(logprobs, teacher_logprobs, mask):
    return -((teacher_logprobs - logprobs) * logprobs)[mask].mean()


def _wrong_sign(logprobs, teacher_logprobs, mask):
    return -_reference(logprobs, teacher_logprobs, mask)


def _other_factor_detached(logprobs, teacher_logprobs, mask):
    return -((teacher_logprobs - logprobs) * logprobs.detach())[mask].mean()


def _divided_by_rows(logprobs, teacher_logprobs, mask):
    return _sum_over_tokens(logprobs, teacher_logprobs, mask) / len(mask)


def _difference_alone(logprobs, teacher_logprobs, mask):
    return (logprobs - teacher_logprobs)[mask].mean()


def _padding_counted(logprobs, teacher_logprobs, mask):
    return -((teacher_logprobs - logprobs).detach() * logprobs).mean()


def _padding_in_the_normalizer(logprobs, teacher_logprobs, mask):
    return _reference(logprobs, teacher_logprobs, mask) * mask.sum() / mask.numel()


def _sum_over_tokens(logprobs, teacher_logprobs, mask):
    return _reference(logprobs, teacher_logprobs, mask) * mask.sum()


def _mean_of_rows(logprobs, teacher_logprobs, mask):
    losses = torch.where(mask, -(teacher_logprobs - logprobs).detach() * logprobs, 0.0)
    return (losses.sum(-1) / mask.sum(-1)).mean()


def _packed() -> list[tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]]:
    random = torch.Generator().manual_seed(6)
    values = torch.rand(5, 6, generator=random)
    mask = torch.arange(6) < torch.tensor([[2], [6], [1], [3], [5]])
    return [
        (values, mask, [torch.tensor([2, 0]), torch.tensor([3]), torch.tensor([4, 1])]),
        (values, mask, [torch.tensor([0, 1, 2, 3]), torch.tensor([4])]),
    ]


def _losses_and_gradients(function, per_token, mask, micro_batches):
    """The losses of the micro-batches, and the gradient of each by the losses per token."""
    leaf = per_token.clone().requires_grad_()
    losses = function(leaf.clone(), mask, micro_batches)
    if not isinstance(losses, list | tuple):
        return losses, None
    if any(isinstance(loss, float | int) for loss in losses):
        raise Told("Your list holds Python numbers: return the losses as tensors, so that they can be differentiated.")
    return losses, [gradient_of(loss, leaf) if isinstance(loss, torch.Tensor) else None for loss in losses]


def _one_normalizer(per_token, mask, micro_batches):
    return [masked_sum(per_token[rows], mask[rows], mask.sum()) for rows in micro_batches]


def _divided_by(count):
    """A function that divides the masked sum of each micro-batch by ``count(mask, rows, micro_batches)``."""
    return lambda per_token, mask, micro_batches: [
        masked_sum(per_token[rows], mask[rows], 1) / count(mask, rows, micro_batches) for rows in micro_batches
    ]


def _without_mask(reduce):
    """A function that reduces the values of each micro-batch, padding and all, by ``reduce(values, mask)``."""
    return lambda per_token, mask, micro_batches: [reduce(per_token[rows], mask) for rows in micro_batches]


def _ratios() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    ratio = torch.tensor([[0.5, 0.9, 1.1, 1.6], [0.6, 0.95, 1.05, 1.4]])
    advantages = torch.tensor([[1.0, 2.0, 0.5, 1.5], [-1.0, -2.0, -3.0, -0.5]])
    old = torch.tensor([[-1.0, -2.0, -0.5, -3.0], [-2.0, -0.1, -1.0, -1.5]])
    mask = torch.tensor([[True, True, True, True], [True, True, True, False]])
    return [
        (old + ratio.log(), old, advantages, mask),
        (old + ratio.log(), old, -advantages, mask),
    ]


def _surrogate(logprobs, old_logprobs, advantages, mask):
    return policy_gradient_loss(logprobs, old_logprobs, advantages, mask)


def _choice(choose, ratio=lambda new, old: (new - old).exp(), mean=lambda values, mask: values[mask].mean()):
    """Mean of −``choose(ρA, clip(ρ)A)`` over unmasked tokens, as a function like the learner's."""

    def loss(logprobs, old_logprobs, advantages, mask):
        moved = ratio(logprobs, old_logprobs)
        return -mean(choose(moved * advantages, moved.clamp(0.8, 1.2) * advantages), mask)

    return loss


def _minimum_of_ratios(logprobs, old_logprobs, advantages, mask):
    ratio = (logprobs - old_logprobs).exp()
    return -(torch.minimum(ratio, ratio.clamp(0.8, 1.2)) * advantages)[mask].mean()


def _masked(values, mask):
    return torch.where(mask, values, 0.0)


_PADDING_COUNTED = "Padding is counted: select the positions with the mask before you take the mean."
_PADDING_IN_THE_NORMALIZER = (
    "Padding is left out of the sum but not of the number it is divided by: use the number of unmasked positions."
)
_SUM = "This is a sum over tokens; the loss is a mean over the response tokens of the batch."
_MEAN_OF_ROWS = (
    "This is a mean over each response first, then over responses: a token of a short one weighs more. Divide once, by "
    "all response tokens."
)
_ROWS = "You divide by the number of rows; the mean is over response tokens."

EXERCISES = (
    Exercise(
        "05.1",
        "the loss of a batch with padding",
        _reference,
        _logprobs_with_padding,
        {
            "The advantage carries a gradient: call detach() on it. As it is, log πθ is differentiated twice over.": (
                _not_detached
            ),
            "No gradient reaches the student: detach the advantage alone, not the factor log πθ beside it.": (
                lambda *arguments: _reference(*arguments).detach()
            ),
            "The sign is the wrong way round: this loss makes rejected tokens more probable.": _wrong_sign,
            "The teacher is not in this gradient: you differentiate the difference of log-probabilities itself. Use it "
            "as a detached factor of log πθ.": _difference_alone,
            "You detached log πθ, and the advantage carries the gradient. It is the other way round: detach the "
            "advantage alone.": _other_factor_detached,
            _PADDING_COUNTED: _padding_counted,
            _PADDING_IN_THE_NORMALIZER: _padding_in_the_normalizer,
            _SUM: _sum_over_tokens,
            _MEAN_OF_ROWS: _mean_of_rows,
            _ROWS: _divided_by_rows,
        },
        _gradient,
        observed="the gradient of your loss by the student's log-probabilities",
    ),
    Exercise(
        "05.2",
        "micro-batches that add up",
        _one_normalizer,
        _packed,
        {
            "Each micro-batch is divided by its own tokens, so the losses add up to something that depends on the "
            "packing: divide by the tokens of the whole batch.": _divided_by(
                lambda mask, rows, parts: mask[rows].sum()
            ),
            "This is the mean of means: each micro-batch is divided by its own tokens and by their number. Divide by "
            "the tokens of the whole batch.": _divided_by(lambda mask, rows, parts: mask[rows].sum() * len(parts)),
            "The normaliser counts padding: use the number of unmasked positions, not B × T.": (
                _divided_by(lambda mask, rows, parts: mask.numel())
            ),
            _ROWS: _divided_by(lambda mask, rows, parts: len(mask)),
            "Each micro-batch's mean is weighed by its share of the rows; it must be its share of the tokens. That is "
            "its sum, divided by the tokens of the whole batch.": _divided_by(
                lambda mask, rows, parts: mask[rows].sum() * len(mask) / len(rows)
            ),
            "These are sums over tokens; the division by the tokens of the whole batch is missing.": (
                _divided_by(lambda mask, rows, parts: 1)
            ),
            "The mask is not used: padding counts in these losses.": (
                _without_mask(lambda values, mask: values.mean()),
                _without_mask(lambda values, mask: values.sum() / mask.sum()),
                _without_mask(lambda values, mask: values.sum() / mask.numel()),
                _without_mask(lambda values, mask: values.sum()),
            ),
            "This is the sum over all micro-batches. Return the list: a trainer calls backward() on one after the "
            "other.": lambda *arguments: sum(_one_normalizer(*arguments)),
            "The numbers are right, but no gradient flows through them: the losses must not be detached.": (
                lambda *arguments: [loss.detach() for loss in _one_normalizer(*arguments)]
            ),
        },
        _losses_and_gradients,
        parts=("your losses", "the gradients of your losses by the losses per token"),
    ),
    Exercise(
        "05.3",
        "the clipped surrogate",
        _surrogate,
        _ratios,
        {
            "You take the larger of the two products; PPO takes the smaller, so that nothing is gained beyond the "
            "clip.": _choice(torch.maximum),
            "You always use the clipped ratio: a token that has moved the wrong way gets no gradient back. Take the "
            "smaller of the clipped and the plain product.": _choice(lambda plain, clipped: clipped),
            "Nothing is clipped here: this is the plain importance-weighted loss.": _choice(
                lambda plain, clipped: plain
            ),
            "The ratio is one of probabilities: take exp() of the difference of the log-probabilities.": (
                _choice(torch.minimum, lambda new, old: new / old),
                _choice(torch.minimum, lambda new, old: new - old),
            ),
            "The smaller ratio is taken before it is multiplied by A. For A below zero the smaller product is that of "
            "the larger ratio: multiply first.": _minimum_of_ratios,
            "The sign is the wrong way round: a loss is minimised, so it is minus the smaller product.": (
                lambda *arguments: -_surrogate(*arguments)
            ),
            "The ratio is upside down: it is the student now over the student that sampled.": (
                _choice(torch.minimum, lambda new, old: (old - new).exp())
            ),
            "No gradient reaches the student: the ratio must not be detached, it is what is differentiated.": (
                lambda *arguments: _surrogate(*arguments).detach()
            ),
            _PADDING_COUNTED: _choice(torch.minimum, mean=lambda values, mask: values.mean()),
            _PADDING_IN_THE_NORMALIZER: _choice(torch.minimum, mean=lambda values, mask: _masked(values, mask).mean()),
            _SUM: _choice(torch.minimum, mean=lambda values, mask: values[mask].sum()),
            _MEAN_OF_ROWS: _choice(
                torch.minimum, mean=lambda values, mask: (_masked(values, mask).sum(-1) / mask.sum(-1)).mean()
            ),
            _ROWS: _choice(torch.minimum, mean=lambda values, mask: values[mask].sum() / len(mask)),
        },
        loss_and_gradient,
        parts=("your loss", "the gradient of your loss by the student's log-probabilities"),
    ),
)
