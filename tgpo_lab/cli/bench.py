"""``tgpo-lab bench``: how fast the loop is, phase by phase, beside the floor that operations and bytes set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..benchmark import measure_case
from ..benchmark_cases import CASES, ENGINES, require_memory_and_disk
from ..errors import InputError
from ..files import require_writable_folder, write_json
from ..provenance import provenance

RATIOS = ("ratio_to_floor", "ratio_to_floor_of_own_shapes", "ratio_to_floor_of_mm")


@dataclass(frozen=True)
class BenchOptions:
    """Time full training steps of TGPO: sampling, teacher, update.

    The floor is the time that the floating-point operations of a step take at the best rate that this machine reaches
    in the same run and in the case's precision; on a GPU it is what the bytes of sampling take at its bandwidth where
    that is more.
    "× own" compares with a floor that takes every matrix product at the rate of its own shape, "× mm" with one at
    the best rate of torch.mm alone, beside which the loop has a faster way on some of AMD's processors.
    """

    cases: tuple[str, ...] = ("tiny", "small", "larger")
    """tiny (the far pair), small (random weights, vocabulary 2,048), larger (random weights, vocabulary 8,192);
    real-0.5b and real-1.5b (random weights of real shapes, bfloat16, vocabulary 151,936, teachers of 1.5 and 7 billion
    weights, for a GPU of 80 GB), real-small (the same in small, for a CPU)."""
    steps: int = 8
    """Steps that count; figures are medians."""
    warmup_steps: int = 2
    """Steps before them that do not."""
    engine: Literal["own", "compiled", "vllm"] = "own"
    """own: as by default. compiled: with compile_decoding. vllm: the extra."""
    gradient_checkpointing: bool | None = None
    """Left out, as the case has it: real ones with, the others without."""
    output: Path = Path("runs/bench")
    """Folder for bench.json."""

    def changes(self) -> dict[str, object]:
        """Fields of a training run that are to differ from the case's."""
        checkpointing = self.gradient_checkpointing
        return ENGINES[self.engine] | ({} if checkpointing is None else {"gradient_checkpointing": checkpointing})


def bench_command(arguments: list[str]) -> int:
    """Time training steps."""
    options = tyro.cli(BenchOptions, args=arguments, prog="tgpo-lab bench")
    for name in ("steps", "warmup_steps"):
        if getattr(options, name) < 1:
            raise InputError(f"{name} must be 1 or more, but is {getattr(options, name)}.")
    if unknown := [name for name in options.cases if name not in CASES]:
        raise InputError(f"Unknown case {unknown[0]!r}: choose from {', '.join(CASES)}.")
    for name in options.cases:
        require_memory_and_disk(CASES[name], **options.changes())
    require_writable_folder(options.output)
    results = []
    for name in options.cases:
        print(f"{name}: {options.warmup_steps} + {options.steps} steps, twice …", flush=True)
        case, steps = CASES[name], {"steps": options.steps, "warmup_steps": options.warmup_steps}
        results.append(measure_case(case, **steps, **options.changes()))
        _show(results[-1])
        write_json(options.output / "bench.json", {"cases": results, "made_by": provenance()})
    if results[-1]["device"] == "CPU":
        print("Measured on a CPU: these numbers say nothing about a GPU.")
    print(f"Written to {options.output / 'bench.json'}.")
    return 0


def _show(result: dict) -> None:
    config, sampling, update, rates = (result[key] for key in ("config", "sampling", "update", "rates"))
    checkpointing = ", gradient checkpointing" if config["gradient_checkpointing"] else ""
    recomputed = f", {update['hardware_utilisation']:.0%} with what is computed twice" if checkpointing else ""
    memory = f"{result['peak_resident_bytes'] / 2**20:,.0f} MiB resident"
    if result["peak_gpu_bytes"] is not None:
        memory += f", {result['peak_gpu_bytes'] / 2**20:,.0f} MiB on the GPU"
    print(
        f"  {result['response_tokens']} tokens a response, {config['precision']}{checkpointing}\n"
        f"  sampling {sampling['tokens_per_second']:,.0f} tokens a second, {sampling['ratio_to_byte_floor']:.1f} × the "
        f"floor of bytes\n"
        f"  update   {update['model_utilisation']:.0%} of the matrix rate{recomputed}\n"
        f"  teacher  {result['teacher_share']:.0%} of the step\n"
        f"  memory   at most {memory}\n"
        f"  machine  {rates['best'] / 1e9:,.0f} billion operations (torch.mm {rates['best_of_mm'] / 1e9:,.0f}), "
        f"{rates['bytes_per_second'] / 1e9:,.0f} billion bytes a second"
    )
    table = Table(box=SIMPLE, pad_edge=False, collapse_padding=True)  # within 80 columns
    for column in ("phase", "seconds", "least–most", "tokens/s", "floor", "× floor", "× own", "× mm"):
        table.add_column(column, justify="left" if column == "phase" else "right", no_wrap=True)
    for name, row in result["rows"].items():
        table.add_row(
            name,
            f"{row['seconds']:.3f}",
            f"{row['seconds_min']:.3f}–{row['seconds_max']:.3f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['floor_seconds']:.3f}",
            *(f"{x:.2f}" if (x := row[key]) < 100 else f"{x:.0f}" for key in RATIOS),
        )
    Console().print(table)
