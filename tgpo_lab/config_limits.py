"""Settings of a run that no run can have, each refused with one sentence."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING

from .engine_limits import require_possible_engine
from .errors import InputError
from .models.positions import require_possible_positions
from .server_limits import refuse_idle_teacher_options, require_server_suffices
from .tasks.prompt_columns import PromptColumns
from .tasks.rewards import reward_function
from .trackers import require_trackers

if TYPE_CHECKING:
    from .config import TrainConfig


def require_possible_settings(config: TrainConfig) -> None:
    """Refuse settings that are impossible by themselves, whatever the pair, the prompts and the machine.

    Raises:
        InputError: the first one found; with what to set instead.
    """
    for name in ("student", "teacher"):
        if getattr(config, name) is not None and not getattr(config, name).strip():
            raise InputError(f"{name} is empty. Give a folder or a hub name, or leave it out for a shipped pair.")
    for item in fields(config):
        if item.type == "float" and not math.isfinite(getattr(config, item.name)):
            raise InputError(f"{item.name} must be a finite number, but is {getattr(config, item.name)}.")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise InputError(f"{name} must be in [0, 1), but is {getattr(config, name)}.")
    for name in ("steps", "prompts_per_step", "group_size", "max_new_tokens", "mini_batches", "passes",
                 "micro_batch_tokens", "evaluation_prompts", "checkpoint_every",
                 "teacher_server_requests"):  # fmt: skip
        if getattr(config, name) < 1:
            raise InputError(f"{name} must be 1 or more, but is {getattr(config, name)}.")
    for name in ("warmup_steps", "weight_decay", "evaluate_every", "measured_positions", "gradient_terms_every",
                 "keep_checkpoints", "seed", "lora_rank", "teacher_server_retries", "sampling_rows"):  # fmt: skip
        if getattr(config, name) < 0:
            raise InputError(f"{name} must be 0 or more, but is {getattr(config, name)}.")
    for name in ("learning_rate", "max_gradient_norm", "lora_alpha", "teacher_server_timeout"):
        if not getattr(config, name) > 0:
            raise InputError(f"{name} must be above 0, but is {getattr(config, name)}.")
    if config.evaluation_temperature < 0:
        raise InputError(f"evaluation_temperature must be 0 (greedy) or more, but is {config.evaluation_temperature}.")
    if not config.temperature > 0:
        raise InputError(
            f"temperature must be above 0 while training, but is {config.temperature}: greedy samples of a group "
            "are all the same, so there is nothing to compare and no policy gradient."
        )
    if config.method.needs_rewards_in_groups and config.group_size < 2:
        raise InputError(
            f"{type(config.method).__name__} compares the samples of a group, so group_size must be 2 or more, "
            f"but is {config.group_size}."
        )
    require_possible_engine(
        config.engine,
        {"temperature": config.temperature, "evaluation_temperature": config.evaluation_temperature},
        importance_cap=config.importance_cap,
        compile_decoding=config.compile_decoding,
        vllm_memory_share=config.vllm_memory_share,
        vllm_sleep=config.vllm_sleep,
    )
    require_possible_positions(config.student_positions, config.student_rope_theta, config.max_new_tokens)
    if config.mini_batches > config.prompts_per_step:
        raise InputError(
            f"mini_batches ({config.mini_batches}) cannot exceed prompts_per_step ({config.prompts_per_step}): "
            "a mini-batch holds whole groups."
        )
    if config.dataset is not None and not config.dataset.strip():
        raise InputError("dataset is empty. Give a folder with train.jsonl or a hub name, or leave dataset out.")
    PromptColumns(config.prompt_column, config.answer_column, config.answer_after)  # checks them
    reward_function(config.reward)
    _ = config.prompt_format  # checks it
    require_trackers(config.trackers)
    if config.teacher_server is not None:
        local_options = ("teacher_device", "teacher_offload", "teacher_cache")
        require_server_suffices(
            config.teacher_server, config.method, {name: getattr(config, name) for name in local_options}
        )
    else:
        refuse_idle_teacher_options(config.method, config.teacher_server_model, config.teacher_cache)
    if config.lora_merged and not config.lora_rank:
        raise InputError("lora_merged merges adapters, but lora_rank is 0: there are none. Set lora_rank.")
