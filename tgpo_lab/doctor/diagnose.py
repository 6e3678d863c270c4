"""An examination before training: will this pair, with these prompts and this batch, work on this machine?

    tgpo-lab doctor --preset gpu-24gb --student Qwen/Qwen2.5-Math-1.5B --teacher Qwen/Qwen3-4B …

takes the options of ``tgpo-lab train``. What cannot work is refused, what only may not is warned about. A refusal ends
the examination where nothing further could be looked at. What a run itself requires is asked here by the same functions
(:mod:`tgpo_lab.loop.requirements`, :mod:`tgpo_lab.runs`). The parts that compare or measure models are in
:mod:`tgpo_lab.doctor.pair_checks` and :mod:`tgpo_lab.doctor.numeric_checks`; settings, the reward,
room and the run's folder have modules of their own.
"""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset

from ..config import TrainConfig
from ..errors import InputError
from ..loop.out_of_memory import told_while_loading
from ..loop.preparation import equip, load_as_in_run
from ..loop.requirements import package_requirements, pair_requirements, require_prompts, require_whole_adapters
from ..models.pairs import load_configuration, load_tokenizer, pair_paths, require_room
from ..parallel.placement import usual_device
from ..run_inputs import prompts_digests, weights_digests
from ..tasks.prompts import load_prompts, training_and_held_out
from ..teachers.sources import open_cache
from .diagnosis import Diagnosis, ExaminationEnded
from .memory_estimate import USUAL_PROMPT
from .model_shape import Shape, shape_of
from .numeric_checks import check_sampling, check_self_distillation, own_responses
from .pair_checks import (
    check_chat_template,
    check_divergence,
    check_ends,
    check_opening,
    check_rows,
    check_tokenizers,
)
from .reward_checks import check_answers, check_reward
from .room_checks import check_disk, check_machine, check_memory
from .run_folder_checks import check_output, check_same_inputs, take_student
from .server_checks import check_server
from .settings_checks import settings_to_change


def diagnose(
    config: TrainConfig,
    *,
    prompts: int = 8,
    card_tokens: int = 256,
    device: str | torch.device | None = None,
    available_memory: int | None = None,
    processes: int = 1,
    sharded: bool = False,
    resume: bool = False,
) -> Diagnosis:
    """Examine a run without starting it. Nothing stays on disk: what is made to see whether it can be is removed.

    Args:
        config: the run.
        prompts: number of held-out prompts to measure on.
        card_tokens: responses for the measurements are cut after so many tokens, or after the run's own limit.
        device: where the run would be; a GPU if there is one.
        available_memory: bytes to compare the estimate with; by default what the device has in all.
        processes: number of processes that the run would have, each with a device like this one.
        sharded: whether FSDP would share the student out among them.
        resume: it would go on from the newest checkpoint in ``config.output``.
    """
    device = torch.device(device or usual_device())
    found = Diagnosis()
    try:
        with found.refused_as("processes"):
            require_possible_processes(config, processes, sharded)
        with found.refused_as("measurement"):
            require_possible_measurement(prompts, card_tokens)
        for option, require in package_requirements(config, device):
            with found.refused_as(option):
                require()
        with found.refused_as("prompts"):
            require_prompts(config)
        checkpoint = check_output(found, config, resume)
        launch = (device, available_memory, processes, sharded)
        with found.refused_as("run"):
            _examine(found, config, prompts, card_tokens, *launch, checkpoint, resume)
    except ExaminationEnded:
        pass
    return found


def _examine(
    found: Diagnosis,
    config: TrainConfig,
    prompts: int,
    card_tokens: int,
    device: torch.device,
    available_memory: int | None,
    processes: int,
    sharded: bool,
    checkpoint: Path | None,
    resume: bool,
) -> None:
    with found.refused_as("pair"):
        if config.teacher is None:
            student_path, teacher_path, own_prompts = pair_paths(config.student)
        else:
            student_path, teacher_path, own_prompts = config.student, config.teacher, None
        tokenizers = load_tokenizer(student_path), load_tokenizer(teacher_path)
    with found.refused_as("tokenizers"):
        shared = check_tokenizers(found, tokenizers, (str(student_path), str(teacher_path)))
    with found.refused_as("chat template"):
        check_chat_template(found, config, *tokenizers)
    shapes = _shapes(found, str(student_path), str(teacher_path))
    known = (shapes[0].weights, shapes[0].hidden) if shapes is not None else (None, None)
    for text, change in settings_to_change(config, *known):
        found.add("warning", "settings", text, change)
    if shapes is not None:
        check_memory(found, config, shapes, device, available_memory, processes, sharded)
        if device.type == "cuda":
            here = min(processes, max(1, torch.cuda.device_count()))  # the others are on other machines
            check_machine(found, config, shapes, here, sharded)
        check_disk(found, config, shapes[0])
    # With another folder the run might start, but not with less memory or disk than it needs.
    if any(finding.level == "refused" and finding.subject != "output" for finding in found.findings):
        return
    served = config.teacher_server is not None
    with found.refused_as("pair"), told_while_loading():
        pair = load_as_in_run(config, device)
    for option, require in pair_requirements(config, pair, device):
        with found.refused_as(option):
            require()
    if not served:
        with found.refused_as("teacher_cache"):
            open_cache(config, pair, keep=False)
    digests = weights_digests(config, pair) if checkpoint is not None else {}
    with found.refused_as("student"):
        take_student(found, config, pair, checkpoint, device, resume=resume)
    check_rows(found, pair, shared)
    with found.refused_as("end tokens"):
        check_ends(found, config, pair, tokenizers)
    with found.refused_as("prompts"):
        training, held_out = _check_prompts(found, config, pair, own_prompts)
    if checkpoint is not None:
        check_same_inputs(found, config, pair, digests | prompts_digests(pair, training, held_out))
    check_answers(found, config, [*training["answer"], *held_out["answer"]])
    few = held_out.select(range(min(prompts, len(held_out))))
    tokens = min(card_tokens, config.max_new_tokens)
    rollouts = own_responses(config, pair, few["prompt"], tokens)
    check_reward(found, config, rollouts.texts(pair.tokenizer), few["answer"])
    if served:
        with found.refused_as("teacher server"):
            check_server(found, config, pair, tokenizers[1], few["prompt"])
    else:
        check_opening(found, pair, tokenizers[1], few["prompt"])
        # Measured together, the two are on one device: that with room for the teacher.
        pair.student.to(pair.teacher.device)
        check_divergence(found, config, pair, few, tokens)
        pair.student.to(device)
    equip(config, pair, begins=checkpoint is None)
    check_self_distillation(found, config, pair, rollouts)
    with found.refused_as("sampling noise"):
        check_sampling(found, config, pair, few["prompt"], [*training["prompt"], *held_out["prompt"]], tokens)


def require_possible_measurement(prompts: int, card_tokens: int) -> None:
    """Refuse a measurement on nothing.

    Raises:
        InputError: there are no prompts or no tokens to measure on.
    """
    for name, value in (("prompts", prompts), ("card_tokens", card_tokens)):
        if value < 1:
            raise InputError(f"{name} must be 1 or more, but is {value}.")


def require_possible_processes(config: TrainConfig, processes: int, sharded: bool) -> None:
    """Refuse a number of processes under which this run cannot be.

    Raises:
        InputError: there are none, one alone is to be shared out, or adapters are.
    """
    if processes < 1:
        raise InputError(f"processes must be 1 or more, but is {processes}.")
    if sharded and processes == 1:
        raise InputError("FSDP shares a student out among several processes, but there is 1. Give more processes.")
    if sharded:
        require_whole_adapters(config)


def _shapes(found: Diagnosis, student: str, teacher: str) -> tuple[Shape, Shape] | None:
    try:
        return tuple(shape_of(load_configuration(path)) for path in (student, teacher))
    except (InputError, OSError, ValueError, AttributeError) as error:
        found.add("warning", "memory", f"The shapes of the models are not known ({error}), so nothing was estimated.")
        return None


def _check_prompts(found: Diagnosis, config: TrainConfig, pair, own_prompts: Path | None) -> tuple[Dataset, Dataset]:
    """Prompts of the run to train on, and held-out ones.

    Raises:
        InputError: they cannot be used.
    """
    source = config.dataset or own_prompts
    splits = load_prompts(source, **config.prompt_options)
    training, held_out = training_and_held_out(splits, config.evaluation_prompts, source)
    everything = [*training["prompt"], *held_out["prompt"]]
    lengths = sorted(len(ids) for ids in pair.encode(everything))
    require_room(pair, everything, config.max_new_tokens)
    text = (
        f"{len(training)} to train on and {len(held_out)} held out; {lengths[len(lengths) // 2]} tokens in the middle, "
        f"{lengths[-1]} at most, and room for {config.max_new_tokens} more."
    )
    found.add("ok", "prompts", text)
    if lengths[-1] > USUAL_PROMPT:
        found.add(
            "warning", "prompts",
            f"The longest prompt has {lengths[-1]} tokens; the memory was estimated for {USUAL_PROMPT}.",
            "Leave out long prompts, or leave more memory free.",
        )  # fmt: skip
    if len(training) < config.prompts_per_step:
        found.add(
            "warning", "prompts",
            f"One step takes {config.prompts_per_step} prompts, but there are {len(training)}: some come twice in it.",
            "Lower prompts_per_step or give more prompts.",
        )  # fmt: skip
    return training, held_out
