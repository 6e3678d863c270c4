"""All that a run needs before its first step: pair, prompts, optimiser, metrics file, or a checkpoint."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset

from ..checkpoints import load_optimizer, read_state
from ..config import TrainConfig
from ..methods import Method
from ..metrics import MetricsLog
from ..models.fused_kernels import fuse_layers
from ..models.lora import add_adapters, load_adapters
from ..models.pairs import Pair, load_model, load_pair, require_room
from ..models.recomputation import enable_recomputation
from ..parallel.processes import Processes
from ..parallel.sharding import shard
from ..precision import dtype_of
from ..run_inputs import prompts_digests, require_same_inputs, weights_digests
from ..runs import METRICS_FILE, check_resumable, held_run, resume_checkpoint, start_run, store_changes
from ..sampling.engine import Engine, make_engine
from ..tasks.prompts import load_prompts, training_and_held_out
from ..tasks.rewards import require_readable_answers
from ..teachers.sources import Teacher, open_teacher
from .requirements import fused_models, require_fitting_options, require_prompts, require_whole_adapters


@dataclass
class Prepared:
    """A run about to make its next step."""

    pair: Pair
    teacher: Teacher
    """Whoever answers for the pair's teacher."""
    training_prompts: Dataset
    held_out: Dataset
    parameters: list[torch.nn.Parameter]
    """Those of the student that are trained."""
    optimizer: torch.optim.Optimizer
    method: Method
    """The run's own copy: a schedule may keep state."""
    log: MetricsLog
    first_step: int
    has_checkpoint: bool
    """False for a run that begins."""
    engine: Engine
    """Samples from the student."""


def load_as_in_run(config: TrainConfig, device: torch.device) -> Pair:
    """A run's pair: each model in the precision and on the device that it has there.

    Args:
        config: the run.
        device: the student's.

    Raises:
        InputError: as of :func:`tgpo_lab.models.pairs.load_pair`.
    """
    dtype = dtype_of(config.precision)
    return load_pair(
        config.student, config.teacher, dtype=dtype, device=device,
        # Frozen weights need no room for small updates.
        student_dtype=dtype if config.lora_rank else torch.float32, teacher_device=config.teacher_weights_device,
        prompt_format=config.prompt_format, **config.position_options,
    )  # fmt: skip


def take_checkpoint(config: TrainConfig, pair: Pair, checkpoint: Path, device: torch.device) -> None:
    """Give a pair as loaded the student of a run's checkpoint: its adapters, or all of it.

    Args:
        config: the run.
        pair: its student is changed or replaced.
        checkpoint: of the run.
        device: of the student.

    Raises:
        InputError: the checkpoint is damaged.
    """
    if config.lora_rank:
        load_adapters(pair.student, checkpoint)
    else:
        del pair.student  # before there is another: the device may have room for one
        pair.student = load_model(checkpoint, torch.float32, device)


def equip(config: TrainConfig, pair: Pair, *, begins: bool = True) -> None:
    """Change a loaded pair's models into those that compute in the run: adapters, fused layers, recomputation.

    Args:
        config: the run.
        pair: its models are changed in place.
        begins: the run has no checkpoint yet, so adapters are new; otherwise the student has them.
    """
    student = pair.student
    if config.lora_rank and begins:
        add_adapters(student, config.lora_rank, config.lora_alpha, config.seed)
    for model, name in fused_models(config, pair):
        fuse_layers(model, name)
    if config.gradient_checkpointing:
        enable_recomputation(student)


def prepare(
    config: TrainConfig, processes: Processes, device: torch.device, held: ExitStack, *, resume: bool
) -> Prepared:
    """Load and check everything, and make the run's folder or read its newest checkpoint.

    Args:
        config: the run.
        processes: the first of them makes the folder.
        device: of this process.
        held: the first process keeps other launches from the run's folder until this ends.
        resume: go on from the newest checkpoint in ``config.output``, or begin again where there is none yet.

    Raises:
        InputError: something in the configuration, the pair or the folder cannot work.
    """
    if processes.sharded:
        require_whole_adapters(config)
    require_prompts(config)
    directory = Path(config.output)
    first_step, checkpoint = 0, None

    def hold() -> None:
        held.enter_context(held_run(directory))

    if resume:
        check_resumable(config, directory)
        processes.first_alone(hold)
        checkpoint = resume_checkpoint(directory, config.steps)
        first_step = read_state(checkpoint).step if checkpoint is not None else 0
    pair = load_as_in_run(config, device)
    require_fitting_options(config, pair, device)
    source = config.dataset or pair.prompts
    splits = load_prompts(source, **config.prompt_options)
    training_prompts, held_out = training_and_held_out(splits, config.evaluation_prompts, source)
    digests = weights_digests(config, pair) | prompts_digests(pair, training_prompts, held_out)
    if checkpoint is not None:
        require_same_inputs(config, pair, digests)
    require_room(pair, [*training_prompts["prompt"], *held_out["prompt"]], config.max_new_tokens)
    require_readable_answers(config.reward, [*training_prompts["answer"], *held_out["answer"]])
    teacher = open_teacher(config, pair, training_prompts["prompt"], device, processes)
    if not resume:
        processes.first_alone(hold)
        processes.first_alone(start_run, config, digests)
    elif checkpoint is not None:
        take_checkpoint(config, pair, checkpoint, device)
    equip(config, pair, begins=checkpoint is None)
    student = pair.student
    if processes.sharded:
        shard(student)
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, config.learning_rate, (config.adam_beta1, config.adam_beta2), weight_decay=config.weight_decay
    )
    method = copy.deepcopy(config.method)
    log = MetricsLog(directory / METRICS_FILE, writes=processes.is_first)
    if checkpoint is not None:
        load_optimizer(checkpoint, student, optimizer)
        if method.schedule is not None:
            method.schedule.load_state(read_state(checkpoint).schedule)
        log.rewind(first_step)
    engine = make_engine(config, pair, [*training_prompts["prompt"], *held_out["prompt"]], processes)
    if resume:
        # Nothing is left that could refuse it. A run that begins again does so with what is there now.
        processes.first_alone(store_changes, config, first_step, digests if checkpoint is None else None)
    return Prepared(pair, teacher, training_prompts, held_out, parameters, optimizer, method, log, first_step,
                    checkpoint is not None, engine)  # fmt: skip
