"""Exercises of notebook 01."""

from __future__ import annotations

import math

import torch

from ..losses import masked_sum, token_logprobs
from .checking import Exercise


def _passes() -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    random = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rows, length, 7, generator=random), torch.randint(7, (rows, length), generator=random), prompt)
        for rows, length, prompt in ((2, 6, 2), (1, 5, 1))
    ]


def _logprobs(logits, tokens, prompt_length):
    return token_logprobs(logits[:, prompt_length - 1 : -1], tokens[:, prompt_length:])


def _unshifted(logits, tokens, prompt_length):
    return token_logprobs(logits[:, prompt_length:], tokens[:, prompt_length:])


def _shifted_twice(logits, tokens, prompt_length):
    return token_logprobs(logits.roll(2, dims=1)[:, prompt_length:], tokens[:, prompt_length:])


def _everything(logits, tokens, prompt_length):
    return token_logprobs(logits[:, :-1], tokens[:, 1:])


def _picked_logits(logits, tokens, prompt_length):
    return logits[:, prompt_length - 1 : -1].gather(-1, tokens[:, prompt_length:].unsqueeze(-1)).squeeze(-1)


def _padded_responses() -> list[tuple[torch.Tensor, int]]:
    return [
        (torch.tensor([[5, 3, 1, 1, 1], [4, 1, 1, 1, 1], [6, 7, 8, 9, 2]]), 1),
        (torch.tensor([[0, 0, 0, 0], [3, 4, 5, 0]]), 0),
    ]


def _places_and_lengths(responses, end_token):
    is_end = responses == end_token
    lengths = torch.where(is_end.any(-1), is_end.int().argmax(-1) + 1, responses.shape[1])
    return torch.arange(responses.shape[1]), lengths.unsqueeze(-1)


def _mask(responses, end_token):
    places, lengths = _places_and_lengths(responses, end_token)
    return places < lengths


def _one_too_many(responses, end_token):
    places, lengths = _places_and_lengths(responses, end_token)
    return places <= lengths


def _cut_rows_forgotten(responses, end_token):
    lengths = (responses == end_token).int().argmax(-1) + 1
    return torch.arange(responses.shape[1]) < lengths.unsqueeze(-1)


def _values() -> list[tuple]:
    values = torch.tensor([[1.0, -2.0, 3.0], [4.0, 8.0, -math.inf]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    return [(values, mask, 8.0), (values, mask), (values[:1], mask[:1], 4.0)]


def _mean_of_rows(values, mask, normalizer=None):
    chosen = torch.where(mask, values, 0.0)
    return chosen.sum() / normalizer if normalizer else (chosen.sum(-1) / mask.sum(-1)).mean()


def _mean_of_rows_always(values, mask, normalizer=None):
    return _mean_of_rows(values, mask)


def _zeros_in_the_mean(values, mask, normalizer=None):
    return torch.where(mask, values, 0.0).mean()


def _with_normalizer(values, mask, normalizer=None):
    return masked_sum(values, mask, normalizer)


EXERCISES = (
    Exercise(
        "01.1",
        "log-probabilities of a response",
        _logprobs,
        _passes,
        {
            "The shift is missing: you asked the row that has read a token about that same token. Take the row before "
            "it.": _unshifted,
            "Shifted one place too far: the row just before a token predicts it, not the one before that.": (
                _shifted_twice
            ),
            "These are the logits of the tokens; a log-probability needs log_softmax over the vocabulary first.": (
                _picked_logits
            ),
            "These are probabilities; the logarithm is missing.": (
                lambda logits, tokens, prompt_length: _logprobs(logits, tokens, prompt_length).exp()
            ),
            "These are −log π, all above zero, as cross_entropy gives them: put a minus sign in front.": (
                lambda logits, tokens, prompt_length: -_logprobs(logits, tokens, prompt_length)
            ),
            "There is one dimension too many, which gather has left at the end: drop the last dimension with "
            "squeeze(-1).": lambda logits, tokens, prompt_length: _logprobs(logits, tokens, prompt_length).unsqueeze(
                -1
            ),
            "This scores the prompt's tokens as well: keep those of the response, from place P on.": _everything,
            "You added the tokens up; keep one number for each token of the response.": (
                lambda logits, tokens, prompt_length: _logprobs(logits, tokens, prompt_length).sum(-1)
            ),
        },
    ),
    Exercise(
        "01.2",
        "a mask when the padding is the end token",
        _mask,
        _padded_responses,
        {
            "The end token that closes a response is missing: it was written, so it counts.": (
                lambda responses, end_token: responses != end_token
            ),
            "This mask is always true: the padding after the first end token counts in it.": (
                lambda responses, end_token: torch.ones_like(responses).bool()
            ),
            "One place too many: a response of n tokens stands at places 0 to n − 1.": _one_too_many,
            "A row without an end token was cut at the token limit: all of it counts. argmax gives 0 there, as if the "
            "first token had ended it.": _cut_rows_forgotten,
            "It is the other way round: True is for what counts.": (
                lambda responses, end_token: ~_mask(responses, end_token)
            ),
            "The numbers are right, but the mask must be bool: a mask of whole numbers picks rows where a bool one "
            "selects.": lambda responses, end_token: _mask(responses, end_token).int(),
        },
    ),
    Exercise(
        "01.3",
        "a masked mean",
        _with_normalizer,
        _values,
        {
            "Not a number: 0 times infinity. Choose with torch.where in place of multiplying by the mask.": (
                lambda values, mask, normalizer=None: (values * mask).sum() / (normalizer or mask.sum())
            ),
            "The normaliser that was given is not used.": (
                lambda values, mask, normalizer=None: masked_sum(values, mask)
            ),
            "Without a normaliser, divide by the number of true places, not by all places.": (
                lambda values, mask, normalizer=None: masked_sum(values, mask, normalizer or mask.numel())
            ),
            "This is a mean of the rows' means: a token of a short row weighs more. Divide once, by all true places.": (
                _mean_of_rows
            ),
            "This is a mean of the rows' means, and the normaliser that was given is not used. Divide the sum once, by "
            "the normaliser.": _mean_of_rows_always,
            "mean() counts the places outside the mask as zeros: divide the sum by the normaliser, and without one by "
            "the number of true places.": _zeros_in_the_mean,
            "This is the sum; the division is missing.": (
                lambda values, mask, normalizer=None: torch.where(mask, values, 0.0).sum()
            ),
        },
    ),
)
