"""An examination before training: will this pair, with these prompts and this batch, work on this machine?

    tgpo-lab doctor --student Qwen/Qwen2.5-Math-1.5B --teacher Qwen/Qwen3-4B --dataset openai/gsm8k …

takes the options of ``tgpo-lab train``. What cannot work is refused, what only may not is warned about. A refusal ends
the examination where nothing further could be looked at. What a run itself requires is asked here by the same functions
(:mod:`tgpo_lab.loop.requirements`, :mod:`tgpo_lab.runs`). The parts that compare or measure models are in
:mod:`tgpo_lab.doctor.pair_checks` and :mod:`tgpo_lab.doctor.numeric_checks`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil
import torch
from datasets import Dataset
from transformers import AutoConfig

from ..byte_sizes import readable_bytes
from ..config import TrainConfig
from ..errors import InputError
from ..loop.out_of_memory import OutOfMemoryError, told_while_loading
from ..loop.preparation import equip, load_as_in_run
from ..loop.requirements import (
    require_fitting_options,
    require_packages,
    require_prompts,
    require_whole_adapters,
)
from ..models.pairs import load_tokenizer, pair_paths, require_room
from ..parallel.placement import usual_device
from ..runs import check_resumable, latest_checkpoint, require_new_run
from ..tasks.prompts import load_prompts, training_and_held_out
from ..tasks.rewards import last_number
from ..teachers.sources import open_cache
from .diagnosis import Diagnosis
from .memory_advice import Advice, memory_advice
from .memory_estimate import USUAL_PROMPT, MemoryEstimate, checkpoint_bytes, estimate_memory, machine_bytes
from .model_shape import Shape, shape_of
from .numeric_checks import check_sampling, check_self_distillation
from .pair_checks import (
    check_chat_template,
    check_divergence,
    check_ends,
    check_opening,
    check_rows,
    check_tokenizers,
)
from .server_checks import check_server

NEARLY_FULL = 0.9
"""Share of memory or disk from which a warning is due."""


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
        require_possible_processes(config, processes, sharded)
        require_packages(config, device)
        require_prompts(config)
        _check_output(found, config, resume)
        _examine(found, config, prompts, card_tokens, device, available_memory, processes, sharded)
    except (InputError, OutOfMemoryError) as error:
        found.add("refused", "pair" if not found.findings else "run", str(error))
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
) -> None:
    if config.teacher is None:
        student_path, teacher_path, own_prompts = pair_paths(config.student)
    else:
        student_path, teacher_path, own_prompts = config.student, config.teacher, None
    tokenizers = load_tokenizer(student_path), load_tokenizer(teacher_path)
    shared = check_tokenizers(found, tokenizers, (str(student_path), str(teacher_path)))
    check_chat_template(found, config, *tokenizers)
    shapes = _shapes(found, str(student_path), str(teacher_path))
    if shapes is not None:
        _check_memory(found, config, shapes, device, available_memory, processes, sharded)
        if device.type == "cuda":
            here = min(processes, max(1, torch.cuda.device_count()))  # the others are on other machines
            _check_machine(found, config, shapes, here, sharded)
        _check_disk(found, config, shapes[0])
    if found.status == 2:
        return
    served = config.teacher_server is not None
    with told_while_loading():
        pair = load_as_in_run(config, device)
    require_fitting_options(config, pair, device)
    if not served:
        open_cache(config, pair, keep=False)
    check_rows(found, pair, shared)
    check_ends(found, config, pair, tokenizers)
    training, held_out = _check_prompts(found, config, pair, own_prompts)
    few = held_out.select(range(min(prompts, len(held_out))))
    tokens = min(card_tokens, config.max_new_tokens)
    if served:
        check_server(found, config, pair, tokenizers[1], few["prompt"])
    else:
        check_opening(found, pair, tokenizers[1], few["prompt"])
        # Measured together, the two are on one device: that with room for the teacher.
        pair.student.to(pair.teacher.device)
        check_divergence(found, config, pair, few, tokens)
        pair.student.to(device)
    equip(config, pair)
    check_self_distillation(found, config, pair, few["prompt"], tokens)
    check_sampling(found, config, pair, few["prompt"], [*training["prompt"], *held_out["prompt"]], tokens)


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


def _check_output(found: Diagnosis, config: TrainConfig, resume: bool) -> None:
    directory = Path(config.output)
    try:
        if resume:
            check_resumable(config, directory)
            latest_checkpoint(directory)
        else:
            require_new_run(directory, keep=False)
    except InputError as error:  # the pair can be looked at all the same
        found.add("refused", "output", str(error))


def _shapes(found: Diagnosis, student: str, teacher: str) -> tuple[Shape, Shape] | None:
    try:
        return tuple(shape_of(AutoConfig.from_pretrained(path, trust_remote_code=False)) for path in (student, teacher))
    except (OSError, ValueError, AttributeError) as error:
        found.add("warning", "memory", f"The shapes of the models are not known ({error}), so nothing was estimated.")
        return None


def _check_memory(
    found: Diagnosis,
    config: TrainConfig,
    shapes: tuple[Shape, Shape],
    device: torch.device,
    available: int | None,
    processes: int,
    sharded: bool,
) -> None:
    cuda = device.type == "cuda"
    if available is None:
        available = torch.cuda.get_device_properties(device).total_memory if cuda else psutil.virtual_memory().total

    def estimate(config: TrainConfig, processes: int, sharded: bool) -> MemoryEstimate:
        return estimate_memory(
            config, *shapes, prompt_tokens=USUAL_PROMPT, device=device, processes=processes, sharded=sharded,
            card=available,
        )  # fmt: skip

    found.memory = estimate(config, processes, sharded)
    parts = ", ".join(f"{name} {readable_bytes(size)}" for name, size in found.memory.parts.items())
    each = f" on each of {processes} devices" if processes > 1 else ""
    needed = f"{readable_bytes(found.memory.total)} of {readable_bytes(available)}{each}"
    text = f"{needed}, with prompts of up to {USUAL_PROMPT} tokens: {parts}."
    advice = []
    if found.memory.total > NEARLY_FULL * available:
        advice = memory_advice(
            config, estimate, longest=USUAL_PROMPT + config.max_new_tokens, cuda=cuda, processes=processes,
            sharded=sharded,
        )  # fmt: skip
    level, change = _fullness(found.memory.total, available, _advised(advice))
    found.add(level, "memory", text, change)


def _check_machine(
    found: Diagnosis, config: TrainConfig, shapes: tuple[Shape, Shape], processes: int, sharded: bool
) -> None:
    parts = machine_bytes(config, *shapes, processes=processes, sharded=sharded)
    if not parts:
        return
    needed, total = sum(parts.values()), psutil.virtual_memory().total
    change = "Take a machine with more memory"
    change += ", or --no-teacher-offload --teacher-server ADDRESS." if config.teacher_offload else "."
    level, change = _fullness(needed, total, change)
    named = ", ".join(f"{name} {readable_bytes(size)}" for name, size in parts.items())
    whose = f"the {processes} processes" if processes > 1 else "the process"
    compared = f"{readable_bytes(needed)} of {readable_bytes(total)}"
    text = f"{compared}, beside the GPU's own, for {whose} on this machine: {named}."
    found.add(level, "machine's memory", text, change)


def _advised(advice: list[Advice]) -> str:
    """One sentence or two; each option with what it saves alone."""
    same, other = (
        ", ".join(f"{a.text} ({readable_bytes(a.saves)} less)" for a in advice if a.another_run == another)
        for another in (False, True)
    )
    sentences = [f"Any of {same}." if same else "", f"Or, for another run, {other}." if other else ""]
    return " ".join(filter(None, sentences)) or "Take smaller models, or a device with more memory."


def _check_disk(found: Diagnosis, config: TrainConfig, student: Shape) -> None:
    one = checkpoint_bytes(config, student)
    written = -(-config.steps // config.checkpoint_every) + 1
    # A new one is whole before an old one is removed.
    count = min(written, config.keep_checkpoints + 1) if config.keep_checkpoints else written
    folder = next(p for p in [Path(config.output).absolute(), *Path(config.output).absolute().parents] if p.exists())
    free = shutil.disk_usage(folder).free
    level, change = _fullness(one * count, free, "Lower keep_checkpoints, or give another output folder.")
    found.add(
        level,
        "disk",
        f"{count} checkpoints of {readable_bytes(one)} need {readable_bytes(one * count)} of {readable_bytes(free)}.",
        change,
    )


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
    if config.reward == "last_number":
        for answer in [*training["answer"], *held_out["answer"]]:
            last_number("", answer)
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


def _fullness(needed: int, available: int, change: str) -> tuple[str, str]:
    if needed > available:
        return "refused", change
    return ("warning", change) if needed > NEARLY_FULL * available else ("ok", "")
