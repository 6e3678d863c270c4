"""What the benchmarks time: pairs with a batch each, from toys to the shapes of real models."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field

import psutil
import torch

from .byte_sizes import readable_bytes
from .config import TrainConfig
from .doctor.memory_estimate import checkpoint_bytes, estimate_memory
from .doctor.model_shape import shape_of
from .errors import InputError
from .random_pair import Dimensions, RandomPair

ENGINES: dict[str, dict[str, object]] = {
    "own": {},
    "compiled": {"compile_decoding": True},
    "vllm": {"engine": "vllm", "vllm_sleep": True},
}
"""Ways to sample, as fields of :class:`tgpo_lab.config.TrainConfig`."""


ALL_AT_ONCE = 2**14
"""Tokens of a micro-batch that holds a whole batch of the small and of the larger case. In trials beside the default of
4,096, teacher and update together took 0.90 and 0.85 of the time on the small case, and 0.92 on the larger one, with a
third more memory."""


@dataclass(frozen=True)
class Case:
    """What is timed."""

    name: str
    pair: str | RandomPair
    """A shipped pair's name, or random weights."""
    settings: dict[str, object] = field(default_factory=dict)
    """Fields of :class:`tgpo_lab.config.TrainConfig` that differ from the preset ``tiny``."""

    def config(self, **changes: object) -> TrainConfig:
        """TGPO with the case's settings and nothing aside, such as evaluation, that is no part of a step.

        Args:
            changes: further fields, and others than the case has.
        """
        nothing_aside = {"evaluate_every": 0, "evaluation_prompts": 1, "gradient_terms_every": 0}
        return TrainConfig.preset("tiny", "tgpo", **{**self.settings, **nothing_aside, **changes})


# Sizes of the published Qwen2.5 models, all with the vocabulary of the two smaller ones. The pairs are of other
# architectures (see RandomPair), so they lack the biases of queries, keys and values: 6 of 100,000 weights.
QWEN_0_5B = Dimensions(896, 24, 14, intermediate_size=4864, key_value_heads=2)
QWEN_1_5B = Dimensions(1536, 28, 12, intermediate_size=8960, key_value_heads=2)
QWEN_7B = Dimensions(3584, 28, 28, intermediate_size=18944, key_value_heads=4, tied=False)


def _real(
    name: str, student: Dimensions, teacher: Dimensions, vocabulary: int, prompt: int, batch: tuple[int, int, int]
) -> Case:
    """A case as a real run would have it; ``batch`` is prompts × samples × tokens of a response."""
    prompts, samples, response = batch
    settings = {
        "precision": "bfloat16",
        "gradient_checkpointing": True,
        "prompts_per_step": prompts,
        "group_size": samples,
        "max_new_tokens": response,
        # Two micro-batches of half the rows each.
        "micro_batch_tokens": prompts * samples // 2 * (prompt + response),
    }
    return Case(name, RandomPair(student, teacher, vocabulary, prompt), settings)


CASES = {
    case.name: case
    for case in (
        Case("tiny", "far"),
        Case(
            "small",
            RandomPair(Dimensions(64, 2, 4), Dimensions(128, 3, 4), vocabulary_size=2048, prompt_tokens=9),
            {"prompts_per_step": 16, "group_size": 8, "max_new_tokens": 64, "micro_batch_tokens": ALL_AT_ONCE},
        ),
        Case(
            "larger",
            RandomPair(Dimensions(256, 4, 4), Dimensions(512, 6, 8), vocabulary_size=8192, prompt_tokens=9),
            {"prompts_per_step": 8, "group_size": 8, "max_new_tokens": 96, "micro_batch_tokens": ALL_AT_ONCE},
        ),
        # Stands in on a CPU for the two after it, which want a card of 80 GB: all that they do, in small.
        _real(
            "real-small",
            Dimensions(256, 4, 8, intermediate_size=1408, key_value_heads=2),
            Dimensions(384, 6, 6, intermediate_size=2048, key_value_heads=2, tied=False),
            vocabulary=4096,
            prompt=16,
            batch=(2, 4, 32),
        ),
        _real("real-0.5b", QWEN_0_5B, QWEN_1_5B, vocabulary=151_936, prompt=64, batch=(8, 8, 512)),
        _real("real-1.5b", QWEN_1_5B, QWEN_7B, vocabulary=151_936, prompt=64, batch=(8, 8, 512)),
    )
}


def require_memory_and_disk(
    case: Case,
    *,
    runs: int = 1,
    available_memory: int | None = None,
    free_disk: int | None = None,
    **changes: object,
) -> None:
    """Refuse a case of random weights that this machine plainly cannot hold; nothing is written before.

    Args:
        case: what is to be timed.
        runs: so many runs of it are in memory at once.
        available_memory: bytes, of which vLLM takes its share; by default all of the GPU's, or what is free on a CPU.
        free_disk: bytes; by default those free where temporary files go.
        changes: further fields of :class:`tgpo_lab.config.TrainConfig`.

    Raises:
        InputError: there is less memory than :mod:`tgpo_lab.doctor.memory_estimate` counts, or less room on disk than
            both models and a run's two checkpoints take.
    """
    if not isinstance(case.pair, RandomPair):
        return
    on_gpu = torch.cuda.is_available()
    if available_memory is None:
        available_memory = (
            torch.cuda.get_device_properties(0).total_memory if on_gpu else psutil.virtual_memory().available
        )
    if free_disk is None:
        free_disk = shutil.disk_usage(tempfile.gettempdir()).free
    config = case.config(**changes)
    student, teacher = (shape_of(configuration) for configuration in case.pair.configurations().values())
    one = estimate_memory(
        config,
        student,
        teacher,
        prompt_tokens=case.pair.prompt_tokens,
        device="cuda" if on_gpu else "cpu",
        card=available_memory,
    ).total
    if runs * one > available_memory:
        raise InputError(
            f"The case {case.name} needs about {readable_bytes(one)} of {'GPU memory' if on_gpu else 'memory'}"
            f"{f' for each of {runs} programs' if runs > 1 else ''}, but there are "
            f"{readable_bytes(available_memory)}: choose a smaller case "
            f"or {'hold one program at a time' if runs > 1 else 'use a larger machine'}."
        )
    stored = 2 if config.precision == "bfloat16" else 4
    first_checkpoint = 4 * student.weights  # without moments
    disk = stored * (student.weights + teacher.weights) + first_checkpoint + checkpoint_bytes(config, student)
    if disk > free_disk:
        raise InputError(
            f"The case {case.name} writes {readable_bytes(disk)} of weights and checkpoints, but "
            f"{tempfile.gettempdir()} has {readable_bytes(free_disk)} free: set TMPDIR to a folder with more room, or "
            "choose a smaller case."
        )
