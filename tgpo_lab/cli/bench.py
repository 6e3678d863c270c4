"""``tgpo-lab bench``: how fast the loop is, phase by phase, beside the floor that the arithmetic sets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..benchmark import CASES, measure_in_own_process
from ..errors import InputError
from ..files import require_writable_folder, write_json
from ..provenance import provenance


@dataclass(frozen=True)
class BenchOptions:
    """Time full training steps of TGPO: sampling, teacher, update.

    The floor is the time that the floating-point operations of a step take at the best float32 rate that this machine
    reaches in the same run. "× own" compares with a floor that takes every matrix product at the rate of its own shape.
    """

    cases: tuple[str, ...] = ("tiny", "small", "larger")
    """tiny (the far pair), small (random weights, vocabulary 2,048) or larger (random weights, vocabulary 8,192)."""
    steps: int = 8
    """Steps that count; figures are medians."""
    warmup_steps: int = 2
    """Steps before them that do not."""
    output: Path = Path("runs/bench")
    """Folder for bench.json."""


def bench_command(arguments: list[str]) -> int:
    """Time training steps."""
    options = tyro.cli(BenchOptions, args=arguments, prog="tgpo-lab bench")
    for name in ("steps", "warmup_steps"):
        if getattr(options, name) < 1:
            raise InputError(f"{name} must be 1 or more, but is {getattr(options, name)}.")
    if unknown := [name for name in options.cases if name not in CASES]:
        raise InputError(f"Unknown case {unknown[0]!r}: choose from {', '.join(CASES)}.")
    require_writable_folder(options.output)
    results = []
    for name in options.cases:
        print(f"{name}: {options.warmup_steps} + {options.steps} steps, twice …", flush=True)
        results.append(measure_in_own_process(CASES[name], steps=options.steps, warmup_steps=options.warmup_steps))
        _show(results[-1])
        write_json(options.output / "bench.json", {"cases": results, "made_by": provenance()})
    print(f"Written to {options.output / 'bench.json'}.")
    return 0


def _show(result: dict) -> None:
    memory = f"{result['peak_resident_bytes'] / 2**20:.0f} MiB resident at most"
    if result["peak_gpu_bytes"] is not None:
        memory += f", {result['peak_gpu_bytes'] / 2**20:.0f} MiB on the GPU"
    print(
        f"{result['response_tokens']} tokens a response, {memory}, "
        f"{result['rates']['best'] / 1e9:.0f} billion operations a second"
    )
    table = Table(box=SIMPLE)
    for column in ("phase", "seconds", "least", "most", "tokens/s", "floor", "× floor", "× own"):
        table.add_column(column, justify="left" if column == "phase" else "right", no_wrap=True)
    for name, row in result["rows"].items():
        table.add_row(
            name,
            *(f"{row[key]:.3f}" for key in ("seconds", "seconds_min", "seconds_max")),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['floor_seconds']:.3f}",
            f"{row['ratio_to_floor']:.2f}",
            f"{row['ratio_to_floor_of_own_shapes']:.2f}",
        )
    Console().print(table)
