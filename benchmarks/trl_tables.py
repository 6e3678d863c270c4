"""The tables that against_trl.py writes, as Markdown."""

from __future__ import annotations

CAVEAT = (
    "The objectives differ. tgpo_lab runs the teacher over the samples and uses its best token and the sampled "
    "token's log-probability (TGPO). GRPOTrainer runs no teacher at all. DistillationTrainer computes a divergence "
    "over the whole vocabulary."
)
SAMPLED_BY = {
    "own": "tgpo_lab samples by itself, TRL by transformers' generate.",
    "compiled": "tgpo_lab samples by itself with compile_decoding, TRL by transformers' generate.",
    "vllm": "Both sample by vLLM, in the same process.",
}
ON_A_CPU = "**On a CPU: these numbers say nothing about a GPU.**"


def tables(result: dict) -> str:
    """All of a result: against TRL, and against the machine where that was measured."""
    versions = {**result["versions"], "trl": result["trl"]}
    setting = ", ".join(f"{name} {versions[name]}" for name in ("trl", "torch", "transformers"))
    note = f" Note: {result['note']}." if result["note"] else ""
    turns = {c["turns"] for c in result["comparisons"]}
    apart = " One program ran after the other." if turns == {"program"} else ""
    parts = [
        against_trl(result["comparisons"]),
        f"Median of {result['rounds']} steps (smallest–largest), {result['device']}, {result['threads']} threads, "
        f"{setting}.{note}{apart} {SAMPLED_BY[result['engine']]} {CAVEAT}",
    ]
    if result["alone"]:
        parts = [against_the_machine(result["alone"]), *parts]
        if result["device"] == "CPU":
            parts = [ON_A_CPU, *parts]
    return "\n\n".join(parts)


def against_trl(comparisons: list[dict]) -> str:
    """Seconds of a step, ratios to this loop, and peak memory of each program's process."""
    lines = [
        "| pair | allocator | program | at once | seconds a step | times as long as tgpo_lab | peak memory |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for comparison in comparisons:
        for name, entry in comparison["programs"].items():
            start = f"| {comparison['case']} | {comparison['allocator']} | {name} |"
            if entry is None:
                lines.append(f"{start} did not fit | | | |")
                continue
            seconds, ratio = (
                f"{entry[key]['median']:.2f} ({entry[key]['min']:.2f}–{entry[key]['max']:.2f})"
                for key in ("seconds", "ratio_of_seconds")
            )
            rows = entry["micro_batch_rows"]
            at_once = f"{rows} rows" if rows else f"{comparison['micro_batch_tokens']:,} tokens"
            lines.append(f"{start} {at_once} | {seconds} | {ratio} | {peak(entry)} |")
    return "\n".join(lines)


def against_the_machine(alone: list[dict]) -> str:
    """This loop by itself: sampling beside the bandwidth, the update beside the matrix rate."""
    lines = [
        "| pair | sampling, tokens a second | × floor of bytes | update, of the matrix rate | with recomputation | "
        "teacher, of the step | step, × floor | peak memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for found in alone:
        sampling, update = found["sampling"], found["update"]
        lines.append(
            f"| {found['case']} | {sampling['tokens_per_second']:,.0f} | {sampling['ratio_to_byte_floor']:.1f} | "
            f"{update['model_utilisation']:.1%} | {update['hardware_utilisation']:.1%} | "
            f"{found['teacher_share']:.0%} | {found['rows']['step']['ratio_to_floor']:.1f} | {peak(found)} |"
        )
    machine = "; ".join(
        f"{found['case']}: {found['config']['precision']}, {found['rates']['best'] / 1e12:,.2f} × 10¹² operations and "
        f"{found['rates']['bytes_per_second'] / 1e9:,.0f} × 10⁹ bytes a second"
        for found in alone
    )
    return "\n".join(lines) + f"\n\nMeasured beside it, {machine}."


def peak(entry: dict) -> str:
    """On the GPU if there is one, else resident."""
    on_gpu = entry["peak_gpu_bytes"]
    return f"{(on_gpu or entry['peak_resident_bytes']) / 2**30:.1f} GiB{' (GPU)' if on_gpu else ''}"
