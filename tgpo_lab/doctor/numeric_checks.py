"""Looks at rounding: the student as its own teacher, and the way a run samples against the way it updates."""

from __future__ import annotations

import functools
import gc
from collections.abc import Sequence

import torch

from ..allocation_errors import is_out_of_memory
from ..config import TrainConfig
from ..diagnostics.logprob_noise import LogprobNoise, sampling_noise, self_distillation_noise
from ..errors import InputError
from ..loop.out_of_memory import elsewhere
from ..models.pairs import Pair
from ..parallel.processes import ALONE
from ..precision import products_in
from ..randomness import generator_for
from ..rollouts import Rollouts
from ..sampling.divided_sampling import sample_divided
from ..sampling.engine import Engine, OwnEngine, make_engine
from .diagnosis import Diagnosis

NOISE_WARNED, NOISE_REFUSED = 0.02, 0.2
"""Mean |Δ log πθ| in nats. PPO's clip lets a ratio change by ±0.2: noise of that size is as large as learning."""

OWN, COMPILED, VLLM = "Own sampling", "Compiled decoding", "vLLM"
"""The ways in which a run may sample."""


def check_self_distillation(found: Diagnosis, config: TrainConfig, pair: Pair, rollouts: Rollouts) -> None:
    """The student as its own teacher, on responses of its own."""
    autocast = functools.partial(products_in, config.precision, pair.student.device)
    noise = self_distillation_noise(pair, pair.student, rollouts, autocast, config.micro_batch_tokens)
    _judge(
        found, "self-distillation", noise, f"The student as its own teacher: |log πθ − log πT| is {_said(noise)}.",
        [_PRECISION] if config.precision != "float32" else [], "or expect a d_t that is only rounding", "report it",
    )  # fmt: skip


def check_sampling(
    found: Diagnosis,
    config: TrainConfig,
    pair: Pair,
    prompts: Sequence[str],
    every_prompt: Sequence[str],
    max_new_tokens: int,
) -> None:
    """The log-probabilities under which the run's own engine draws, against those of the update.

    Args:
        found: is added to.
        config: the run.
        pair: with its student as in the run.
        prompts: to sample on.
        every_prompt: all of the run, for the longest of which the engine must have room.
        max_new_tokens: responses are cut after so many tokens.

    Raises:
        InputError: the engine cannot work with this student, or on this machine.
        OutOfMemoryError: memory ran out.
    """
    path = VLLM if config.engine == "vllm" else COMPILED if config.compile_decoding else OWN
    device = pair.student.device
    where = "the CPU" if device.type == "cpu" else str(device)
    try:
        engine = make_engine(config, pair, list(every_prompt), ALONE)
        rollouts = _sampled(engine, config, pair, prompts, max_new_tokens)
    except InputError:
        raise
    except Exception as error:  # a compiler that is missing, a kernel that the card lacks: each has its own
        if is_out_of_memory(error):
            raise elsewhere(error, config) from error
        if path not in _WITHOUT:
            raise
        # An engine wraps it in a sentence about checkpoints, which there are none of here.
        first = error.__cause__ or error
        reason = f"{type(first).__name__}: {' '.join(str(first).split())[:300]}"
        found.add(
            "refused", "sampling noise", f"{path} failed here, on {where}: {reason}", f"{_WITHOUT[path].capitalize()}."
        )
        return
    finally:
        engine = None  # vLLM has its share of the card
        gc.collect()
        torch.cuda.empty_cache()  # nothing where there is no GPU
    autocast = functools.partial(products_in, config.precision, device)
    noise = sampling_noise(pair, rollouts, config.temperature, autocast, config.micro_batch_tokens)
    text = (
        f"{path} against the update, on {where}: |Δ log πθ| is {_said(noise)}, at temperature {config.temperature:g}."
    )
    if device.type == "cpu":
        text += " What it is on a GPU was not measured."
    options = [_PRECISION] if config.precision != "float32" else []
    if config.importance_cap is None and (path == VLLM or noise.mean < NOISE_REFUSED):
        options.append("importance_cap (truncated importance weights)")
    remedy = f"{_WITHOUT[path]}, and report it" if path in _WITHOUT else "report it"
    _judge(
        found, "sampling noise", noise, text, options, "or expect gradients from tokens that another policy drew",
        remedy,
    )  # fmt: skip


_PRECISION = "precision float32"
_WITHOUT = {VLLM: "set engine to own", COMPILED: "set compile_decoding to false"}


def own_responses(config: TrainConfig, pair: Pair, prompts: Sequence[str], max_new_tokens: int) -> Rollouts:
    """One response of the student to each prompt, sampled by the loop's own engine."""
    return _sampled(OwnEngine(pair.student), config, pair, prompts, max_new_tokens)


def _sampled(engine: Engine, config: TrainConfig, pair: Pair, prompts: Sequence[str], max_new_tokens: int) -> Rollouts:
    """One response to each prompt, as a step of the run samples it."""
    with products_in(config.precision, pair.student.device):
        return sample_divided(
            ALONE, engine, pair.encode(list(prompts)), max_new_tokens, pair.end_tokens, pair.pad_token,
            temperature=config.temperature, generator=generator_for(config.seed, "doctor"),
            vocabulary_size=pair.vocabulary_size,
        )  # fmt: skip


def _said(noise: LogprobNoise) -> str:
    return f"{noise.mean:.2g} nats in the mean, {noise.largest:.2g} at most"


def _judge(
    found: Diagnosis, subject: str, noise: LogprobNoise, text: str, options: list[str], otherwise: str, remedy: str
) -> None:
    """Add a finding.

    Args:
        found: is added to.
        subject: of the finding.
        noise: decides its level.
        text: of the finding.
        options: what to set against noise.
        otherwise: what to expect where nothing is set.
        remedy: what to do where the noise is too large to be rounding.
    """
    if noise.mean < NOISE_WARNED:
        found.add("ok", subject, text)
        return
    refused = not noise.mean < NOISE_REFUSED  # so that NaN is refused
    setting = f"Set {' or '.join(options)}" if options else ""
    if refused:
        change = f"{setting}. " if setting else ""
        change += f"If float32 does not help, this student is computed differently on the two ways: {remedy}."
    else:
        change = f"{setting}, {otherwise}." if setting else f"{otherwise.removeprefix('or ').capitalize()}."
    found.add("refused" if refused else "warning", subject, text, change)
