"""The doctor's look at room: of the device, of the machine's memory, and on the disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil
import torch

from ..byte_sizes import readable_bytes
from ..config import TrainConfig
from .diagnosis import Diagnosis
from .memory_advice import Advice, memory_advice
from .memory_estimate import USUAL_PROMPT, MemoryEstimate, checkpoint_bytes, estimate_memory, machine_bytes
from .model_shape import Shape

NEARLY_FULL = 0.9
"""Share of memory or disk from which a warning is due."""


def check_memory(
    found: Diagnosis,
    config: TrainConfig,
    shapes: tuple[Shape, Shape],
    device: torch.device,
    available: int | None,
    processes: int,
    sharded: bool,
) -> None:
    """The estimate against what the device has, or ``available`` bytes."""
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


def check_machine(
    found: Diagnosis, config: TrainConfig, shapes: tuple[Shape, Shape], processes: int, sharded: bool
) -> None:
    """What a GPU's run keeps in the machine's own memory, for the processes on it."""
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


def check_disk(found: Diagnosis, config: TrainConfig, student: Shape) -> None:
    """The checkpoints against what the disk has left."""
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


def _fullness(needed: int, available: int, change: str) -> tuple[str, str]:
    if needed > available:
        return "refused", change
    return ("warning", change) if needed > NEARLY_FULL * available else ("ok", "")
