"""What must hold before a run is made: asked by the run itself, and by the doctor without starting one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedModel

from ..config import TrainConfig
from ..errors import InputError
from ..models.fused_kernels import require_fused_kernels, require_known_to_liger
from ..models.lora import require_peft
from ..models.pairs import Pair
from ..sampling.decoding import require_cached_reading
from ..sampling.engine import require_engine
from ..sampling.vllm_engine import require_vllm

Requirement = tuple[str, Callable[[], None]]
"""The option of a run that asks for it, and what raises InputError where it does not hold."""


def package_requirements(config: TrainConfig, device: torch.device) -> list[Requirement]:
    """What this run needs of packages and of the student's device."""
    found: list[Requirement] = []
    if config.lora_rank:
        found.append(("lora_rank", require_peft))
    if config.engine == "vllm":
        found.append(("engine", require_vllm))
    if config.fused_kernels:
        found.append(("fused_kernels", partial(require_fused_kernels, device)))
    return found


def require_packages(config: TrainConfig, device: torch.device) -> None:
    """Refuse a run whose options need packages that are not here, or another device.

    Args:
        config: the run.
        device: the student's.

    Raises:
        InputError: names the option, and how the package is installed.
    """
    for _, require in package_requirements(config, device):
        require()


def require_prompts(config: TrainConfig) -> None:
    """Refuse a pair without prompts, before billions of weights are loaded.

    Raises:
        InputError: the pair is none of the shipped ones, and no dataset is given.
    """
    if config.dataset is None and config.teacher is not None:
        raise InputError(
            f"{config.student} + {config.teacher} brings no prompts. Give a dataset: a folder with train.jsonl, or a "
            "hub name."
        )


def require_whole_adapters(config: TrainConfig) -> None:
    """Refuse adapters in a run whose student FSDP shares out.

    Raises:
        InputError: the run trains adapters.
    """
    if config.lora_rank:
        raise InputError(
            f"lora_rank is {config.lora_rank}, but adapters are not trained under FSDP: frozen weights need neither "
            "gradients nor moments to share out. Start without FSDP, or set lora_rank to 0."
        )


def pair_requirements(config: TrainConfig, pair: Pair, device: torch.device) -> list[Requirement]:
    """What this run's options need of its pair, loaded, and of the device that the student has in the run."""
    return [
        ("student", partial(_require_no_adapters, config, pair)),
        ("guidance_top_k", partial(_require_tokens, config, pair)),
        *(
            ("fused_kernels", partial(require_known_to_liger, model, name))
            for model, name in fused_models(config, pair)
        ),
        ("engine", partial(require_engine, config, pair.student, device)),
        *(
            [("method", partial(require_cached_reading, pair.teacher, config.teacher or pair.name))]
            if config.traces_per_prompt and pair.teacher.device.type != "meta"
            else []
        ),
    ]


def _require_no_adapters(config: TrainConfig, pair: Pair) -> None:
    if getattr(pair.student, "peft_config", None):
        raise InputError(
            f"{config.student} holds adapters, frozen as they were loaded, and a run trains a whole model or adapters "
            "of its own. Go on with the run that made them (--resume), or merge them into their base first: peft's "
            "merge_and_unload, or checkpoints of a run with lora_merged."
        )


def _require_tokens(config: TrainConfig, pair: Pair) -> None:
    if config.method.top_k > pair.vocabulary_size:
        raise InputError(
            f"guidance_top_k ({config.method.top_k}) cannot exceed the tokens of the pair ({pair.vocabulary_size})."
        )


def require_fitting_options(config: TrainConfig, pair: Pair, device: torch.device) -> None:
    """Refuse options of a run that this pair cannot have.

    Args:
        config: the run.
        pair: loaded.
        device: of the student in the run, which need not be where it is now.

    Raises:
        InputError: a student that is adapters on a base, more guiding tokens than the pair has, an architecture that
            Liger or compiled decoding does not know, a student that vLLM cannot follow.
    """
    for _, require in pair_requirements(config, pair, device):
        require()


def fused_models(config: TrainConfig, pair: Pair) -> list[tuple[PreTrainedModel, str]]:
    """Models of a pair that get fused kernels in this run, each with its name."""
    if not config.fused_kernels:
        return []
    models = [(pair.student, config.student)]
    # One that is offloaded, or on a CPU or nowhere, keeps its layers.
    if pair.teacher.device.type == "cuda" and not config.teacher_offload:
        models.append((pair.teacher, config.teacher or pair.name))
    return models
