"""What would make a run need less memory: options that are not set yet, each tried on the estimate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..config import TrainConfig
from ..errors import InputError
from .memory_estimate import MemoryEstimate

Estimate = Callable[[TrainConfig, int, bool], MemoryEstimate]
"""Of a run, with a number of processes, shared out by FSDP or not."""

RANK = 32
"""Of the adapters that are proposed."""
PROCESSES = 8
"""Over which FSDP is proposed for a run of one process."""


@dataclass(frozen=True)
class Advice:
    """One change of a run."""

    text: str
    """As on the command line."""
    config: TrainConfig
    """The run with the change."""
    processes: int
    sharded: bool
    saves: int
    """Bytes by which the estimate is lower then."""
    another_run: bool
    """It changes what is trained, or on what, not only where it is kept or how it is computed."""


def memory_advice(
    config: TrainConfig, estimate: Estimate, *, longest: int, cuda: bool, processes: int = 1, sharded: bool = False
) -> list[Advice]:
    """What lowers the largest part of a run's memory, and all of it, the most first.

    Where nothing lowers that part, what lowers the total. Changes that make another run of it come last.

    Args:
        config: the run.
        estimate: its estimate, and that of any other.
        longest: tokens of the longest prompt and response.
        cuda: on a GPU. On a CPU there is nowhere to move anything to but a server.
        processes: number of processes.
        sharded: whether FSDP shares the student out among them.
    """
    now = estimate(config, processes, sharded)
    largest = max((name for name in now.parts if name not in ("context", "fragments")), key=now.parts.__getitem__)
    found, at_largest = [], []
    for text, changes, number, shared, another in _options(config, estimate, longest, cuda, processes, sharded):
        try:
            changed = config.with_changes(**changes)
        except InputError:  # this run cannot have it: a method that a server does not suffice for
            continue
        after = estimate(changed, number, shared)
        if after.total < now.total:
            found.append(Advice(text, changed, number, shared, now.total - after.total, another))
            # vLLM that sleeps takes as much, but no longer beside everything else.
            sleeps = largest == "vLLM" and changed.vllm_sleep and not config.vllm_sleep
            if sleeps or after.parts.get(largest, 0) < now.parts[largest]:
                at_largest.append(found[-1])
    return sorted(at_largest or found, key=lambda advice: (advice.another_run, -advice.saves))


def _options(
    config: TrainConfig, estimate: Estimate, longest: int, cuda: bool, processes: int, sharded: bool
) -> Iterator[tuple[str, dict[str, object], int, bool, bool]]:
    """Text, changed fields, processes, whether FSDP shares out, and whether it is another run then."""

    def same(text: str, **changes: object) -> tuple[str, dict[str, object], int, bool, bool]:
        return text, changes, processes, sharded, False

    bound = _rows_that_are_not_the_largest(config, estimate, processes, sharded)
    if bound is not None:
        yield same(f"--sampling-rows {bound}", sampling_rows=bound)
    if config.micro_batch_tokens > longest:
        yield same(f"--micro-batch-tokens {longest}", micro_batch_tokens=longest)
    if not config.gradient_checkpointing:
        yield same("--gradient-checkpointing", gradient_checkpointing=True)
    if config.precision == "float32":
        yield same("--precision bfloat16", precision="bfloat16")
    if not config.lora_rank and not sharded:  # adapters are not trained under FSDP
        yield f"--lora-rank {RANK}", {"lora_rank": RANK}, processes, sharded, True
    plain = ""
    if config.compile_decoding:
        yield same("--no-compile-decoding", compile_decoding=False)
        plain = " --no-compile-decoding"
    if cuda and config.engine == "own":
        vllm = {"engine": "vllm", "vllm_sleep": True, "compile_decoding": False}
        yield same(f"--engine vllm --vllm-sleep{plain}", **vllm)
    if cuda and config.engine == "vllm":
        if not config.vllm_sleep:
            yield same("--vllm-sleep", vllm_sleep=True)
        share = round(config.vllm_memory_share / 2, 3)
        yield same(f"--vllm-memory-share {share}", vllm_memory_share=share)
    if config.teacher_server is None and config.teacher_device is None:
        here = " --no-teacher-offload" if config.teacher_offload else ""
        yield same(f"--teacher-server ADDRESS{here}", teacher_server="http://host:8000/v1", teacher_offload=False)
        if cuda and processes == 1:  # several would all put theirs on that card
            yield same(f"--teacher-device cuda:1{here}", teacher_device="cuda:1", teacher_offload=False)
        if cuda and not config.teacher_offload:
            yield same("--teacher-offload", teacher_offload=True)
    if cuda and not sharded and not config.lora_rank:
        number = processes if processes > 1 else PROCESSES
        launch = f"accelerate launch --use_fsdp --fsdp_version 2 --num_processes {number}"
        yield launch, {}, number, True, False
    for name in ("prompts_per_step", "group_size", "max_new_tokens"):
        if (half := getattr(config, name) // 2) > 0:
            yield f"--{name.replace('_', '-')} {half}", {name: half}, processes, sharded, True


def _rows_that_are_not_the_largest(
    config: TrainConfig, estimate: Estimate, processes: int, sharded: bool
) -> int | None:
    """The bound, from the rows that are written now by halves, at which another phase needs the most; at least a group.
    None where no bound changes anything."""
    bound = config.sampling_rows or max(config.prompts_per_step * config.group_size, config.evaluation_prompts)
    now, found = estimate(config, processes, sharded), None
    while bound > config.group_size:
        bound = max(config.group_size, bound // 2)
        bounded = estimate(config.with_changes(sampling_rows=bound), processes, sharded)
        if bounded.total < now.total:
            found = bound
        if not {"sampling", "teacher's responses"} & bounded.parts.keys():
            break
    return found
