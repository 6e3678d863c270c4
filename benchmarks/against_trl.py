"""One whole on-policy step (sampling, teacher, update) of this loop and of TRL's trainers, on the same work.

    python benchmarks/against_trl.py

Every program lives in a process of its own, keeps its models loaded and takes a step only when told
to. Steps go round in turn (A B C A B C …), so a drift of the machine hits all alike; a round gives
one ratio. Same random-weight models, prompts, batch, lengths, temperature, precision (float32) and
optimiser (AdamW); no evaluation, no checkpoints, no reports. For TRL gradient checkpointing is off and
the fastest of several micro-batch sizes is taken; this loop keeps its default. By default all of it
is run twice: with the allocator as it is, and with one that keeps its memory.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from kept_results import RESULTS, keep_results
from programs import DISTILLATION, GRPO, LOOP, LOOP_MEASURING

from tgpo_lab.benchmark import CASES, write_random_pair
from tgpo_lab.config import TrainConfig
from tgpo_lab.provenance import provenance

PROGRAMS = Path(__file__).with_name("programs.py")
OWN_FILE = RESULTS / "against_trl.json"

ALLOCATORS = {
    "default": {},
    # glibc then never gives memory back, so large tensors do not fault in their pages again at every step.
    "keeping": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "8000000000"},
}
CAVEAT = (
    "The objectives differ. tgpo_lab runs the teacher over the samples and uses its best token and the sampled "
    "token's log-probability (TGPO). GRPOTrainer runs no teacher at all. DistillationTrainer computes a divergence "
    "over the whole vocabulary."
)


@dataclass(frozen=True)
class Options:
    """Compare one whole step with TRL's trainers."""

    cases: tuple[Literal["small", "larger"], ...] = ("small", "larger")
    """Which of the random-weight pairs of `tgpo-lab bench`."""
    rounds: int = 12
    """Steps of each program that count."""
    warmup_rounds: int = 2
    """Steps before them that do not."""
    trial_rounds: int = 3
    """Steps in which a micro-batch size of TRL is tried."""
    allocators: tuple[Literal["default", "keeping"], ...] = ("default", "keeping")
    """keeping: MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=8000000000 for all programs."""
    note: str = ""
    """A remark on the machine that is kept with the numbers, for example that it was shared."""
    output: Path = OWN_FILE
    """Where the numbers go. At the default place the table goes into README.md as well."""


# ── Comparison ───────────────────────────────────────────────────────────────────────────────────


class Worker:
    """A process that takes a step when asked."""

    def __init__(self, name: str, case: str, folder: Path, environment: dict[str, str], micro_batch_rows: int = 0):
        self.name, self.micro_batch_rows = name, micro_batch_rows
        self._errors = folder / f"{name} {micro_batch_rows}.txt"
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(PROGRAMS), name, case, str(folder), str(micro_batch_rows)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **environment},
            )

    def step(self) -> dict[str, float]:
        """Take one step; seconds by the clock and of processor time."""
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        status = self._process.wait()
        raise RuntimeError(f"{self.name} ended with status {status}:\n{self._errors.read_text()[-4000:]}")

    def stop(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


def in_turn(workers: list[Worker], rounds: int, warmup_rounds: int) -> dict[Worker, list[dict[str, float]]]:
    """Steps of all workers in turn; the warm-up rounds are left out."""
    taken = [{worker: worker.step() for worker in workers} for _ in range(warmup_rounds + rounds)]
    return {worker: [steps[worker] for steps in taken[warmup_rounds:]] for worker in workers}


def fastest(name: str, case: str, folder: Path, environment: dict[str, str], rows: int, rounds: int) -> int:
    """TRL's best micro-batch size: the whole batch, or a half, a quarter … of it. Tried one after the other, as memory
    would not hold them all."""
    seconds = {}
    for micro_batch_rows in (rows // parts for parts in (1, 2, 4, 8, 16)):
        worker = Worker(name, case, folder, environment, micro_batch_rows)
        taken = in_turn([worker], rounds, warmup_rounds=1)[worker]
        worker.stop()
        seconds[micro_batch_rows] = statistics.median(step["seconds"] for step in taken)
    return min(seconds, key=seconds.__getitem__)


def compare(case: str, allocator: str, folder: Path, options: Options) -> dict[str, object]:
    """Measure one case with one allocator."""
    settings, environment = CASES[case].settings, ALLOCATORS[allocator]
    rows = settings["prompts_per_step"] * settings["group_size"]
    best = {name: fastest(name, case, folder, environment, rows, options.trial_rounds) for name in (GRPO, DISTILLATION)}
    workers = [Worker(name, case, folder, environment, best.get(name, 0)) for name in (LOOP, LOOP_MEASURING, *best)]
    taken = in_turn(workers, options.rounds, options.warmup_rounds)
    for worker in workers:
        worker.stop()
    programs = {}
    for worker in workers:
        entry: dict[str, object] = {"micro_batch_rows": worker.micro_batch_rows or None}
        for unit in ("seconds", "processor_seconds"):
            values = [step[unit] for step in taken[worker]]
            ratios = [v / ours[unit] for v, ours in zip(values, taken[workers[0]], strict=True)]
            entry[unit] = spread(values)
            entry[f"ratio_of_{unit}"] = spread(ratios)
        programs[worker.name] = entry
    micro_batch_tokens = TrainConfig.preset("tiny").micro_batch_tokens
    return {"case": case, "allocator": allocator, "micro_batch_tokens": micro_batch_tokens, "programs": programs}


def spread(values: list[float]) -> dict[str, float]:
    """Median and both ends."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table(result: dict[str, object]) -> str:
    """Seconds of a step and ratios to this loop, as Markdown."""
    lines = [
        "| pair | allocator | program | rows at once | seconds a step | times as long as tgpo_lab |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for comparison in result["comparisons"]:
        for name, entry in comparison["programs"].items():
            seconds, ratio = (
                f"{entry[key]['median']:.2f} ({entry[key]['min']:.2f}–{entry[key]['max']:.2f})"
                for key in ("seconds", "ratio_of_seconds")
            )
            rows = entry["micro_batch_rows"] or "default"
            lines.append(
                f"| {comparison['case']} | {comparison['allocator']} | {name} | {rows} | {seconds} | {ratio} |"
            )
    versions = {**result["versions"], "trl": result["trl"]}
    setting = ", ".join(f"{name} {versions[name]}" for name in ("trl", "torch", "transformers"))
    note = f" {result['note']}" if result["note"] else ""
    return (
        "\n".join(lines) + f"\n\nMedian of {result['rounds']} steps (smallest–largest), {result['device']}, "
        f"{result['threads']} threads, "
        f"{setting}.{note} {CAVEAT}"
    )


def main(options: Options) -> None:
    """Run the comparisons and write the results."""
    comparisons = []
    for case in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            write_random_pair(CASES[case].pair, Path(folder))
            for allocator in options.allocators:
                comparisons.append(compare(case, allocator, Path(folder), options))
    result = {
        "comparisons": comparisons,
        "rounds": options.rounds,
        "note": options.note,
        "caveat": CAVEAT,
        "trl": importlib.metadata.version("trl"),
        **provenance(),
    }
    keep_results(result, table(result), options.output, OWN_FILE, "table")


if __name__ == "__main__":
    main(tyro.cli(Options))
