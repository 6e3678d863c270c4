"""A whole step and its phases beside the floor that floating-point operations set (tgpo_lab/operations.py).

    python benchmarks/step_floor.py

Writes benchmarks/results/step_floor.json and the table in benchmarks/README.md.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bad_input import require_at_least, run_script
from kept_results import RESULTS, keep_results

from tgpo_lab.benchmark import measure_case
from tgpo_lab.benchmark_cases import CASES, require_memory_and_disk
from tgpo_lab.operations import PHASES
from tgpo_lab.provenance import provenance

OWN_FILE = RESULTS / "step_floor.json"
RATIOS = ("ratio_to_floor", "ratio_to_floor_of_mm")


@dataclass(frozen=True)
class Options:
    """Time full training steps of TGPO beside their floor."""

    cases: tuple[Literal["tiny", "small", "larger"], ...] = ("small", "larger")
    """Which pairs of `tgpo-lab bench`."""
    steps: int = 12
    """Steps that count."""
    warmup_steps: int = 2
    """Steps before them that do not."""
    runs: int = 3
    """Times that each case is measured; the run with the middle step is shown. On a virtual machine the time of small
    operations can change from run to run, and stay so for minutes."""
    output: Path = OWN_FILE
    """A JSON file for the numbers. The table goes into README.md if they go to their own file."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "steps", "warmup_steps", "runs")


def main(options: Options) -> None:
    """Measure the cases one after the other and keep the numbers."""
    for name in options.cases:
        require_memory_and_disk(CASES[name])
    found = []
    for name in options.cases:
        runs = []
        for number in range(options.runs):
            print(f"{name}, run {number + 1} of {options.runs} …", file=sys.stderr)
            runs.append(measure_case(CASES[name], steps=options.steps, warmup_steps=options.warmup_steps))
        runs.sort(key=lambda run: run["rows"]["step"]["seconds"])
        of_runs = {key: [run["rows"]["step"][key] for run in runs] for key in RATIOS}
        of_runs["seconds_sample"] = [run["rows"]["sample"]["seconds"] for run in runs]
        found.append({**runs[len(runs) // 2], "of_runs": of_runs})
    result = {"cases": found, "made_by": provenance()}
    keep_results(result, table(result), options.output, OWN_FILE, "floor table")


def table(result: dict) -> str:
    """Seconds, floors and their ratios, and the rates that the floors were taken at."""
    lines = [
        "| pair | phase | seconds | floor | × floor | floor at the rate of torch.mm | × that floor |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in result["cases"]:
        for name in (*PHASES, "step"):
            row = case["rows"][name]
            lines.append(
                f"| {case['case']} | {name} | {row['seconds']:.3f} ({row['seconds_min']:.3f}–{row['seconds_max']:.3f}) "
                f"| {row['floor_seconds']:.3f} | {row['ratio_to_floor']:.2f} "
                f"| {row['floor_of_mm_seconds']:.3f} | {row['ratio_to_floor_of_mm']:.2f} |"
            )
    rates = "; ".join(
        f"{case['case']}: {case['rates']['best'] / 1e9:,.0f} × 10⁹ operations a second, "
        f"{case['rates']['best_of_mm'] / 1e9:,.0f} by torch.mm, step "
        + " and ".join(f"{listed(case['of_runs'][key], 2)} ×" for key in RATIOS)
        + f", sampling {listed(case['of_runs']['seconds_sample'], 3)} s"
        for case in result["cases"]
    )
    made_by, first = result["made_by"], result["cases"][0]
    return "\n".join(lines) + (
        f"\n\nMedian of {first['steps']} steps (smallest–largest) of the run with the middle step, "
        f"{first['config']['precision']}, {made_by['processor']}, {made_by['threads']} threads, torch "
        f"{made_by['versions']['torch']}. Rates of that run, and of every run both ratios of a step and the seconds of "
        f"sampling, {rates}."
    )


def listed(numbers: list[float], digits: int) -> str:
    """As text, so many digits after the point."""
    return ", ".join(f"{number:.{digits}f}" for number in numbers)


if __name__ == "__main__":
    run_script(main, Options)
