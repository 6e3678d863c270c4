"""How fast the training loop is, phase by phase, beside the floor of :mod:`tgpo_lab.operations`.

What is timed is :func:`tgpo_lab.training.train` itself, by the clock that it writes to its metrics. Each
case is trained twice: with almost no positions measured, for the step alone, and with as many as by
default, for the step as a user has it; each time in a process of its own, whose memory is its own. The first
steps are dropped, the others give medians. On a GPU the floor of sampling is the larger one of that which
operations set and that which bytes do (:mod:`tgpo_lab.bandwidth`).
"""

from __future__ import annotations

import multiprocessing
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import pandas as pd
import psutil
import torch
from transformers import PreTrainedModel

from .bandwidth import bandwidth, bytes_of_sampling
from .benchmark_cases import Case
from .config import TrainConfig
from .models.pairs import load_tokenizer, load_without_weights, pair_paths
from .operations import PHASES, MatrixRates, Work, work_of_step
from .parallel.placement import usual_device
from .precision import dtype_of
from .random_pair import RandomPair, paths_of, write_random_pair
from .sampling.vllm_engine import require_vllm
from .tasks.prompts import load_prompts
from .training import train

Result = TypeVar("Result")


def measure_case(
    case: Case, *, steps: int, warmup_steps: int, folder: Path | None = None, **changes: object
) -> dict[str, object]:
    """Train a case and measure its steps.

    Args:
        case: what is timed.
        steps: steps that count.
        warmup_steps: steps before them that do not.
        folder: where :func:`tgpo_lab.random_pair.write_random_pair` has put the case's pair already.
        changes: further fields of :class:`TrainConfig`.

    Returns:
        Plain values: seconds (median, smallest and largest), tokens per second of the student's response
        tokens, operations, three floors in seconds; the sampling, the update and the teacher's share each by
        itself; operations and bytes per second of this machine; and peak memory in bytes.

    Raises:
        InputError: an unknown shipped pair, or vLLM is wanted and missing; nothing is written before.
    """
    if case.config(**changes).engine == "vllm":
        require_vllm()
    with tempfile.TemporaryDirectory() as runs:
        paths = {"student": case.pair}
        if isinstance(case.pair, RandomPair):
            paths = paths_of(folder or Path(runs))
            if folder is None:
                in_own_process(write_random_pair, case.pair, Path(runs), precision=case.config().precision)
        count = warmup_steps + steps
        config = case.config(**paths, **changes, steps=count, checkpoint_every=count)
        bare_config = config.with_changes(measured_positions=1, output=f"{runs}/bare")
        bare, bare_memory = in_own_process(_run, bare_config, warmup_steps)
        whole, whole_memory = in_own_process(_run, config.with_changes(output=f"{runs}/whole"), warmup_steps)
        student, teacher, prompt = _models_and_prompt(config)

    device = torch.device(usual_device())
    tokens, response = float(bare["tokens"].median()), round(bare["length"].median())
    batch = config.prompts_per_step, config.group_size, prompt, response
    # Llama and Qwen3, as all cases are, read a prompt once for all its samples on a CPU.
    sharing = [] if device.type == "cuda" else ["teacher"] if config.gradient_checkpointing else ["teacher", "update"]
    work = work_of_step(student, teacher, *batch, sharing=sharing)
    dtype = dtype_of(config.precision)
    rates = MatrixRates(device, dtype)
    bytes_read, bytes_per_second = bytes_of_sampling(student, *batch, dtype), bandwidth(device)
    byte_floor = bytes_read / bytes_per_second
    own_shapes = {phase: rates.floor_of_own_shapes(work[phase]) for phase in PHASES}
    floors = {phase: rates.floor(work[phase]) for phase in PHASES}
    of_mm = {phase: rates.floor_of_mm(work[phase]) for phase in PHASES}
    for floors_of in (floors, own_shapes, of_mm):
        floors_of["sample"] = floor_of_sampling(device, floors_of["sample"], byte_floor)
    timed = {phase: bare[f"seconds_{phase}"] for phase in PHASES}
    timed["step"] = bare[[f"seconds_{phase}" for phase in (*PHASES, "reward")]].sum(axis=1)
    timed["measured step"] = whole[[f"seconds_{phase}" for phase in (*PHASES, "reward", "measure")]].sum(axis=1)
    rows = {}
    for name, seconds in timed.items():
        counted = [name] if name in PHASES else list(PHASES)
        floor, floor_own, floor_mm = (sum(f[phase] for phase in counted) for f in (floors, own_shapes, of_mm))
        median = float(seconds.median())
        rows[name] = {
            "seconds": median,
            "seconds_min": float(seconds.min()),
            "seconds_max": float(seconds.max()),
            "tokens_per_second": tokens / median,
            "operations": sum(work[phase].operations for phase in counted),
            "floor_seconds": floor,
            "ratio_to_floor": median / floor,
            "floor_of_own_shapes_seconds": floor_own,
            "ratio_to_floor_of_own_shapes": median / floor_own,
            "floor_of_mm_seconds": floor_mm,
            "ratio_to_floor_of_mm": median / floor_mm,
        }
    return {
        "case": case.name,
        "config": config.as_dict(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "prompt_tokens": prompt,
        "response_tokens": response,
        "steps": steps,
        "rows": rows,
        "sampling": {
            "tokens_per_second": rows["sample"]["tokens_per_second"],
            "bytes": bytes_read,
            "byte_floor_seconds": byte_floor,
            "ratio_to_byte_floor": rows["sample"]["seconds"] / byte_floor,
            "operation_floor_seconds": rates.floor(work["sample"]),
        },
        "update": utilisation(work, rows["update"]["seconds"], rates.best, config.gradient_checkpointing),
        "teacher_share": float((timed["teacher"] / timed["step"]).median()),
        "rates": {
            "square": rates.square,
            "best": rates.best,
            "best_of_mm": rates.best_of_mm,
            "bytes_per_second": bytes_per_second,
        },
        **{name: max(size, whole_memory[name]) if size else None for name, size in bare_memory.items()},
    }


def floor_of_sampling(device: torch.device, operations: float, reading: float) -> float:
    """Seconds that sampling needs at least, of those of its operations and of reading its bytes from memory.

    Of both the larger one on a GPU. Of a small model all that is read may lie in a processor's cache: then the
    bandwidth of memory sets no floor.
    """
    return max(operations, reading) if device.type == "cuda" else operations


def utilisation(work: dict[str, Work], seconds: float, rate: float, checkpointing: bool) -> dict[str, float]:
    """Shares of the measured matrix rate that an update reaches.

    Args:
        work: of :func:`tgpo_lab.operations.work_of_step`.
        seconds: of the update.
        rate: operations per second.
        checkpointing: whether it computes the layers' forward pass twice.

    Returns:
        ``model_utilisation`` by the operations of the formula (three times the forward pass, nothing twice), and
        ``hardware_utilisation`` with the recomputation of gradient checkpointing, which is the same without it.
    """
    model = work["update"].operations
    hardware = model + (work["recomputation"].operations if checkpointing else 0)
    return {"model_utilisation": model / seconds / rate, "hardware_utilisation": hardware / seconds / rate}


def in_own_process(function: Callable[..., Result], *arguments: object, **options: object) -> Result:
    """Call a function in a fresh process, so that memory and GPU are its own and free again afterwards."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments, **options).result()


def peak_memory() -> dict[str, int | None]:
    """Most memory that this process has held, in bytes: resident, and on the GPU if there is one."""
    if sys.platform == "win32":
        resident = psutil.Process().memory_info().peak_wset
    elif sys.platform == "linux":
        # Not getrusage's: a new process starts there with what its parent held when it was forked.
        lines = Path("/proc/self/status").read_text().splitlines()
        resident = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    else:
        import resource  # does not exist on Windows

        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"peak_resident_bytes": resident, "peak_gpu_bytes": gpu}


def _run(config: TrainConfig, warmup_steps: int) -> tuple[pd.DataFrame, dict[str, int | None]]:
    """Metrics of the steps that count, and peak memory. What was written is removed: the next run needs the room."""
    metrics = train(config, show_progress=False).metrics
    shutil.rmtree(config.output)
    return metrics.iloc[warmup_steps:-1], peak_memory()  # the last row is no step


def _models_and_prompt(config: TrainConfig) -> tuple[PreTrainedModel, PreTrainedModel, int]:
    """Both models without weights, and the mean number of tokens of a prompt."""
    student, teacher, prompts = config.student, config.teacher, config.dataset
    if teacher is None:
        student, teacher, prompts = pair_paths(student)
    texts = list(load_prompts(prompts, **config.prompt_options)["train"]["prompt"])
    encoded = config.prompt_format.encode(load_tokenizer(student), texts)
    return load_without_weights(student), load_without_weights(teacher), round(sum(map(len, encoded)) / len(encoded))
