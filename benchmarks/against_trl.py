"""One whole on-policy step (sampling, teacher, update) of this loop and of TRL's trainers, on the same work.

    python benchmarks/against_trl.py
    python benchmarks/against_trl.py --cases real-0.5b real-1.5b --allocators default      # a GPU of 80 GB

Every program lives in a process of its own, keeps its models loaded and takes a step only when told
to. Steps go round in turn (A B C A B C …), so a drift of the machine hits all alike; a round gives
one ratio. Where one program fills most of a card, the next begins when it has ended. Same random-weight
models, prompts, batch, lengths, temperature, precision, gradient checkpointing and optimiser (AdamW);
no evaluation, no checkpoints, no reports. For TRL the fastest of several micro-batch sizes is taken;
this loop keeps that of the case. The real cases are also timed by themselves, beside what the machine
can do. By default all of it is run twice: with the allocator as it is, and with one that keeps its memory.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bad_input import require_at_least, run_script
from kept_results import RESULTS, keep_results
from programs import DISTILLATION, GRPO, LOOP, LOOP_MEASURING
from trl_tables import CAVEAT, tables

from tgpo_lab.allocation_errors import is_killed_for_memory, is_out_of_memory
from tgpo_lab.benchmark import in_own_process, measure_case
from tgpo_lab.benchmark_cases import CASES, ENGINES, Case, require_memory_and_disk
from tgpo_lab.provenance import provenance
from tgpo_lab.random_pair import write_random_pair
from tgpo_lab.sampling.vllm_engine import require_vllm

PROGRAMS = Path(__file__).with_name("programs.py")

ALLOCATORS = {
    "default": {},
    # glibc then never gives memory back, so large tensors do not fault in their pages again at every step; and PyTorch
    # asks for pages of 2 MiB.
    "keeping": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "8000000000", "THP_MEM_ALLOC_ENABLE": "1"},
}
TRAINERS = {"grpo": GRPO, "distillation": DISTILLATION}
REAL = ("real-small", "real-0.5b", "real-1.5b")
"""Cases whose results go to files of their own, and which are timed by themselves as well."""
LARGE = ("real-0.5b", "real-1.5b")
"""Those of which one program fills most of a card of 80 GB, and a step takes long."""


@dataclass(frozen=True)
class Options:
    """Compare one whole step with TRL's trainers."""

    cases: tuple[Literal["small", "larger", "real-small", "real-0.5b", "real-1.5b"], ...] = ("small", "larger")
    """Which of the random-weight pairs of `tgpo-lab bench`."""
    engine: Literal["own", "compiled", "vllm"] = "own"
    """own, compiled (with compile_decoding): TRL samples by transformers' generate. vllm: both sample by vLLM."""
    trainers: tuple[Literal["grpo", "distillation"], ...] = ("grpo", "distillation")
    """Of TRL: GRPOTrainer and DistillationTrainer."""
    turns: Literal["step", "program"] | None = None
    """step: all programs stay in memory and take steps in turn. program: one after the other, each with the memory for
    itself. Left out: program for real-0.5b and real-1.5b, step for the others."""
    rounds: int = 12
    """Steps of each program that count."""
    warmup_rounds: int = 2
    """Steps before them that do not."""
    trial_rounds: int = 3
    """Steps in which a micro-batch size of TRL is tried; one for real-0.5b and real-1.5b."""
    allocators: tuple[Literal["default", "keeping"], ...] = ("default", "keeping")
    """keeping: MALLOC_MMAP_MAX_=0, MALLOC_TRIM_THRESHOLD_=8000000000, THP_MEM_ALLOC_ENABLE=1 for all programs."""
    note: str = ""
    """A remark on the machine that is kept with the numbers, for example: shared machine."""
    output: Path | None = None
    """A JSON file for the numbers. Left out, they go to results/against_trl.json, those of real cases to
    results/real_pairs.json, and the tables into README.md."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "rounds", "trial_rounds")
        require_at_least(0, self, "warmup_rounds")

    def turns_of(self, case: str) -> str:
        """How the programs of a case take turns."""
        return self.turns or ("program" if case in LARGE else "step")


# ── Comparison ───────────────────────────────────────────────────────────────────────────────────


class Worker:
    """A process that takes a step when asked; it ends with the context."""

    def __init__(self, name: str, case: str, engine: str, folder: Path, allocator: str, micro_batch_rows: int = 0):
        self.name = name
        self._errors = folder / f"{name} {micro_batch_rows}.txt"
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(PROGRAMS), name, case, engine, str(folder), str(micro_batch_rows)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **ALLOCATORS[allocator]},
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()

    def step(self) -> dict[str, float]:
        """Take one step; seconds by the clock and of processor time, and peak memory in bytes.

        Raises:
            MemoryError: the process was killed, as Linux does when memory runs out.
            RuntimeError: it has ended otherwise; with the last lines of its errors.
        """
        with suppress(BrokenPipeError):  # its output has ended, too
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        status = self._process.wait()
        said = f"{self.name} ended with status {status}:\n{self._errors.read_text()[-4000:]}"
        raise MemoryError(said) if is_killed_for_memory(status) else RuntimeError(said)


def steps_of(programs: dict[str, int], case: str, allocator: str, folder: Path, options: Options) -> dict[str, list]:
    """Steps of some programs by name, in turn; the warm-up rounds are left out.

    Args:
        programs: rows of a micro-batch by name, 0 for what the case says.
        case: its name.
        allocator: its name.
        folder: with the pair.
        options: number of rounds, and the engine.
    """
    with ExitStack() as stack:
        workers = [
            stack.enter_context(Worker(name, case, options.engine, folder, allocator, rows))
            for name, rows in programs.items()
        ]
        taken = [[worker.step() for worker in workers] for _ in range(options.warmup_rounds + options.rounds)]
    return dict(zip(programs, map(list, zip(*taken[options.warmup_rounds :], strict=True)), strict=True))


def fastest(name: str, case: str, allocator: str, folder: Path, options: Options) -> int | None:
    """TRL's best micro-batch size: the whole batch, or a half, a quarter … of it; of large cases a quarter, an eighth
    or a sixteenth. Tried one after the other, as memory would not hold them all; None where none fits."""
    config, seconds = CASES[case].config(), {}
    rows = config.prompts_per_step * config.group_size
    rounds = 1 if case in LARGE else options.trial_rounds
    for micro_batch_rows in sorted({max(1, rows // parts) for parts in (1, 2, 4, 8, 16)[2 * (case in LARGE) :]}):
        print(f"{case}: {name}, micro-batches of {micro_batch_rows} rows …", flush=True)
        with Worker(name, case, options.engine, folder, allocator, micro_batch_rows) as worker:
            try:
                taken = [worker.step() for _ in range(1 + rounds)][1:]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                break  # larger ones need more
        seconds[micro_batch_rows] = statistics.median(step["seconds"] for step in taken)
    return min(seconds, key=seconds.__getitem__, default=None)


def compare(case: str, allocator: str, folder: Path, options: Options) -> dict[str, object]:
    """Measure one case with one allocator."""
    found = {TRAINERS[key]: fastest(TRAINERS[key], case, allocator, folder, options) for key in options.trainers}
    programs = {LOOP: 0, LOOP_MEASURING: 0, **{name: rows for name, rows in found.items() if rows is not None}}
    turns = options.turns_of(case)
    print(f"{case}: {', '.join(programs)} …", flush=True)
    together = [programs] if turns == "step" else [{name: rows} for name, rows in programs.items()]
    taken = {}
    for some in together:
        taken |= steps_of(some, case, allocator, folder, options)
    entries: dict[str, object] = dict.fromkeys([LOOP, LOOP_MEASURING, *found])
    for name, steps in taken.items():
        entries[name] = entry = {"micro_batch_rows": programs[name] or None}
        for unit in ("seconds", "processor_seconds"):
            values = [step[unit] for step in steps]
            entry[unit] = spread(values)
            entry[f"ratio_of_{unit}"] = spread([v / o[unit] for v, o in zip(values, taken[LOOP], strict=True)])
        entry |= {key: steps[-1][key] for key in ("peak_resident_bytes", "peak_gpu_bytes")}
    return {
        "case": case,
        "allocator": allocator,
        "turns": turns,
        "micro_batch_tokens": CASES[case].config().micro_batch_tokens,
        "programs": entries,
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and both ends."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def require_engine_and_room(options: Options) -> None:
    """Refuse what the machine cannot sample with or hold, before anything is written.

    Raises:
        InputError: vLLM is wanted and missing, or memory or disk is too small for a case.
    """
    if options.engine == "vllm":
        require_vllm()
    for case in options.cases:
        together = 2 + len(options.trainers) if options.turns_of(case) == "step" else 1
        require_memory_and_disk(CASES[case], runs=together, **ENGINES[options.engine])


def measure(case: Case, options: Options) -> tuple[list[dict], list[dict]]:
    """Comparisons of one case, and what it takes by itself if it is a real one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        in_own_process(write_random_pair, case.pair, folder, precision=case.config().precision)
        alone = []
        if case.name in REAL:
            print(f"{case.name}: {LOOP} by itself …", flush=True)
            steps = {"steps": options.rounds, "warmup_steps": options.warmup_rounds}
            alone.append(measure_case(case, folder=folder, **steps, **ENGINES[options.engine]))
        return [compare(case.name, allocator, folder, options) for allocator in options.allocators], alone


def main(options: Options) -> None:
    """Run the comparisons and write the results."""
    require_engine_and_room(options)
    measured = {case: measure(CASES[case], options) for case in options.cases}
    places = {
        "table": (RESULTS / "against_trl.json", [case for case in options.cases if case not in REAL]),
        "real table": (RESULTS / "real_pairs.json", [case for case in options.cases if case in REAL]),
    }
    if options.output:
        places = {"": (options.output, list(options.cases))}
    for name, (path, cases) in places.items():
        if not cases:
            continue
        result = {
            "comparisons": [comparison for case in cases for comparison in measured[case][0]],
            "alone": [found for case in cases for found in measured[case][1]],
            "rounds": options.rounds,
            "engine": options.engine,
            "note": options.note,
            "caveat": CAVEAT,
            "trl": importlib.metadata.version("trl"),
            **provenance(),
        }
        keep_results(result, tables(result), path, path if name else None, name)


if __name__ == "__main__":
    run_script(main, Options)
