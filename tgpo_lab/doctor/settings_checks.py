"""Settings of a run that do not suit its student: said by the doctor, and by ``tgpo-lab train`` before it starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from transformers import AutoConfig

from ..config import PRESETS, TrainConfig
from ..methods import make_method, method_name
from .model_shape import shape_of

LARGE = 50_000_000
"""Weights from which a student is none of the tiny world, whose largest has 11 million."""
PAPERS_RATE = PRESETS["paper"]["learning_rate"]
HIGHEST_RATE, HIGHEST_RATE_OF_ADAPTERS = 1e-5, 1e-3
"""Learning rates of a large student from which a warning is due: all weights, and adapters alone."""
HIGHEST_RATE_OF_ANY = 0.1
"""Of every student. AdamW changes each weight by about the rate in a step."""
MIDDLE_WEIGHT = 0.12
"""Half of the weights of each shipped student that is trained are smaller than so much, but not than 0.11."""


def settings_to_change(config: TrainConfig, weights: int | None, width: int | None = None) -> list[tuple[str, str]]:
    """What was found, and what to change.

    Args:
        config: the run.
        weights: number of the student's weights; None if it is not known.
        width: of its residual stream.
    """
    return list(_found(config, weights or 0, width))


def _found(config: TrainConfig, weights: int, width: int | None) -> Iterator[tuple[str, str]]:
    large = weights > LARGE
    rate = f"learning_rate is {config.learning_rate:g}"
    size = f"{weights / 1e6:,.0f} million weights"
    if large and not config.lora_rank and config.learning_rate > HIGHEST_RATE:
        yield (
            f"{rate} for all {size} of {config.student}; the paper's is {PAPERS_RATE:g}.",
            f"Set --learning-rate {PAPERS_RATE:g}, or train adapters: --lora-rank 32 --learning-rate "
            f"{PRESETS['gpu-24gb']['learning_rate']:g}.",
        )
    elif large and config.lora_rank and config.learning_rate > HIGHEST_RATE_OF_ADAPTERS:
        rates = ", ".join(f"{PRESETS[name]['learning_rate']:g} in {name}" for name in _with_adapters())
        yield (
            f"{rate} for adapters of {config.student}, which has {size}; the presets with adapters have {rates}.",
            f"Lower learning_rate to {HIGHEST_RATE_OF_ADAPTERS:g} or less.",
        )
    elif config.learning_rate > HIGHEST_RATE_OF_ANY:
        yield (
            f"{rate}: AdamW changes each weight by about as much in a step, and half of the weights of the shipped "
            f"students are smaller than {MIDDLE_WEIGHT:g}.",
            f"Lower learning_rate; the preset tiny has {TrainConfig.learning_rate:g}.",
        )
    if large and config.teacher is not None and (tiny := _of_the_tiny_world(config)):
        yield (
            f"These are settings for sums of the tiny world, but {config.student} has {size}: {'; '.join(tiny)}.",
            f"Start from a preset, and put your own --student, --teacher and --dataset after it: {_presets()}. Or set "
            "what is named here.",
        )
    if width is not None and config.lora_rank > width:
        yield (
            f"lora_rank is {config.lora_rank}, but {config.student} is {width} wide: adapters of a higher rank than a "
            "matrix have more weights than it and can do no more.",
            f"Lower lora_rank to {width} or less, or set it to 0 to train all weights.",
        )


def _of_the_tiny_world(config: TrainConfig) -> list[str]:
    """Settings that stand as in the preset tiny, where nothing but sums of three numbers is asked."""
    found = []
    if config.reward == TrainConfig.reward:
        found.append(f"reward {config.reward} (the integer after the last #)")
    if config.max_new_tokens == TrainConfig.max_new_tokens:
        found.append(f"max_new_tokens {config.max_new_tokens}")
    if not found:
        return []
    name = method_name(config.method)
    ours, papers = config.method, make_method(name)
    if ours == make_method(name, tiny=True) != papers and ours.schedule is not None:
        found.append(f"the teacher's weight {ours.schedule} (the paper's: {papers.schedule})")
    return found


def _with_adapters() -> list[str]:
    return [name for name, fields in PRESETS.items() if fields.get("lora_rank")]


def _presets() -> str:
    return ", ".join(
        f"--preset {name} ({fields['student']} taught by {fields['teacher']})"
        for name, fields in PRESETS.items()
        if "student" in fields
    )


def warn_of_settings(config: TrainConfig) -> None:
    """Print to the error stream what :func:`settings_to_change` finds; of several processes the first does."""
    # The name under which accelerate and torchrun say which it is; asking accelerate would set the processes up.
    if os.environ.get("RANK", "0") != "0":
        return
    weights = width = None
    if config.teacher is not None:  # the shipped ones are small
        try:
            shape = shape_of(AutoConfig.from_pretrained(config.student, trust_remote_code=False))
            weights, width = shape.weights, shape.hidden
        except (OSError, ValueError, AttributeError, KeyError, RuntimeError, TypeError):
            pass  # the run itself says what is wrong with it
    for text, change in settings_to_change(config, weights, width):
        print(f"tgpo-lab: {text} {change}", file=sys.stderr)
