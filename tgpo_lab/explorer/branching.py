"""Another token at one place of a response, and what the student writes from there."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..errors import InputError
from ..models.pairs import Pair
from ..randomness import generator_for
from ..rollouts import Rollouts
from ..sampling.cached_sampling import sample_responses


@torch.no_grad()
def continue_after(
    pair: Pair,
    rollouts: Rollouts,
    row: int,
    position: int,
    token: int,
    *,
    max_new_tokens: int,
    model: PreTrainedModel | None = None,
    continuations: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
) -> Rollouts:
    """Responses that keep the first ``position`` tokens of one, have ``token`` next, and go on as the student likes.

    Args:
        pair: brings the end tokens, and the student unless ``model`` is given.
        rollouts: holds the response.
        row: which one.
        position: of the token that is replaced, from 0.
        token: id of the token that takes its place.
        max_new_tokens: of the whole response, the kept tokens included.
        model: the student that goes on, in evaluation mode.
        continuations: how many; their random numbers are their own, so one may be right by luck.
        temperature: of sampling; 0 is greedy.
        seed: decides the samples, together with the place and the token.

    Returns:
        ``continuations`` rows on the model's device. If ``token`` ends the response, or is the last that the limit
        allows, all are the same.

    Raises:
        InputError: the response, the position or the token does not exist, or the limit cuts the token off.
    """
    model = model or pair.student
    if not 0 <= row < len(rollouts):
        raise InputError(f"There is no response {row}: there are {len(rollouts)}, counted from 0.")
    length = int(rollouts.lengths[row])
    if not 0 <= position < length:
        raise InputError(f"There is no token {position} in this response: it has {length}, counted from 0.")
    if not 0 <= token < pair.vocabulary_size:
        raise InputError(f"{token} is no token: ids go from 0 to {pair.vocabulary_size - 1}.")
    if position >= max_new_tokens:
        raise InputError(f"A response of at most {max_new_tokens} tokens has no token {position}, counted from 0.")
    if continuations < 1:
        raise InputError(f"continuations must be 1 or more, but is {continuations}.")
    prompt = rollouts.prompts[row]
    kept = [*rollouts.responses[row, :position].tolist(), token]
    left = max_new_tokens - len(kept)
    ends = token in pair.end_tokens
    device = model.device
    start = torch.tensor([kept] * continuations, device=device)  # (continuations, position + 1)
    if ends or not left:
        return Rollouts(
            [prompt] * continuations,
            start,
            torch.ones_like(start, dtype=torch.bool),
            torch.full((continuations,), ends, device=device),
            pair.pad_token,
        )
    rest = sample_responses(
        model,
        [[*prompt, *kept]],
        left,
        pair.end_tokens,
        pair.pad_token,
        samples_per_prompt=continuations,
        temperature=temperature,
        generator=generator_for(seed, "branch", position, token),
        vocabulary_size=pair.vocabulary_size,
    )
    return Rollouts(
        [prompt] * continuations,
        torch.cat([start, rest.responses], -1),
        torch.cat([torch.ones_like(start, dtype=torch.bool), rest.mask], -1),
        rest.finished,
        pair.pad_token,
    )
