"""Sampling with the prompts divided over processes."""

from __future__ import annotations

import torch

from ..parallel.processes import Processes
from ..rollouts import Rollouts
from .engine import Engine


def sample_divided(
    processes: Processes,
    engine: Engine,
    prompts: list[list[int]],
    max_new_tokens: int,
    end_tokens: list[int],
    pad_token: int,
    *,
    samples_per_prompt: int = 1,
    **options: object,
) -> Rollouts:
    """:meth:`tgpo_lab.sampling.engine.Engine.sample`, each process its share of the prompts; all get all responses.

    They are those of one process, as long as rounding does not carry a random number over the edge of a token.

    Args:
        processes: to divide the prompts over.
        engine: of this process.
        prompts, max_new_tokens, end_tokens, pad_token, samples_per_prompt, options: as there.
    """
    share = processes.share(len(prompts))
    own = None
    with engine.load_weights():
        if len(share):
            own = engine.sample(
                prompts[share.start : share.stop], max_new_tokens, end_tokens, pad_token,
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
    logprobs = torch.zeros(rows, width, device=processes.device)
    if own is not None and own.logprobs is not None:
        logprobs[here, : own.logprobs.shape[1]] = own.logprobs
    drawn = processes.any(own is not None and own.logprobs is not None)
    for values in (responses, lengths, finished, logprobs):
        processes.sum(values)
    mask = torch.arange(width, device=processes.device) < lengths.unsqueeze(-1)
    return Rollouts(
        [prompt for prompt in prompts for _ in range(samples_per_prompt)],
        responses.where(mask, pad_token),
        mask,
        finished.bool(),
        pad_token,
        logprobs if drawn else None,
    )
