"""Sampling with the prompts divided over processes."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .processes import Processes
from .rollouts import Rollouts
from .sampling import sample_responses
from .sharding import whole_weights


def sample_divided(
    processes: Processes,
    model: PreTrainedModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    end_tokens: list[int],
    pad_token: int,
    *,
    samples_per_prompt: int = 1,
    **options: object,
) -> Rollouts:
    """:func:`tgpo_lab.sampling.sample_responses`, each process with its share of the prompts; all get all responses.

    They are those of one process, as long as rounding does not carry a random number over the edge of a token.

    Args:
        processes: to divide the prompts over.
        model, prompts, max_new_tokens, end_tokens, pad_token, samples_per_prompt, options: as there.
    """
    share = processes.share(len(prompts))
    own = None
    with whole_weights(model):
        if len(share):
            own = sample_responses(
                model, prompts[share.start : share.stop], max_new_tokens, end_tokens, pad_token,
                samples_per_prompt=samples_per_prompt, first=share.start, of=len(prompts), **options,
            )  # fmt: skip
    if processes.number == 1:
        return own
    width = processes.largest(0 if own is None else own.responses.shape[1])
    rows = len(prompts) * samples_per_prompt
    responses = torch.zeros(rows, width, dtype=torch.long, device=processes.device)
    lengths, finished = (torch.zeros(rows, dtype=torch.long, device=processes.device) for _ in range(2))
    if own is not None:
        here = slice(share.start * samples_per_prompt, share.stop * samples_per_prompt)
        responses[here, : own.responses.shape[1]], lengths[here], finished[here] = (
            own.responses,
            own.lengths,
            own.finished,
        )
    for values in (responses, lengths, finished):
        processes.sum(values)
    mask = torch.arange(width, device=processes.device) < lengths.unsqueeze(-1)
    return Rollouts(
        [prompt for prompt in prompts for _ in range(samples_per_prompt)],
        responses.where(mask, pad_token),
        mask,
        finished.bool(),
        pad_token,
    )
