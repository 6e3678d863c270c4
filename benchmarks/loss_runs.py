"""The runs of loss_memory.py: kept together in one file, shown together in one table."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from tgpo_lab.errors import InputError

LOSSES = {"tgpo": "TGPO", "exact-rkl": "exact reverse KL"}
VERSIONS = {"chunks": "in chunks", "plain": "plain"}


def earlier_runs(file: Path) -> list[dict[str, object]]:
    """The runs that a results file holds; none without a file.

    Raises:
        InputError: it is another file.
    """
    if not file.exists():
        return []
    try:
        return json.loads(file.read_text(encoding="utf-8"))["runs"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file} holds no runs of this benchmark. Give another --output, or remove the file."
        ) from error


def with_run(runs: list[dict[str, object]], run: dict[str, object]) -> list[dict[str, object]]:
    """Runs with another one in the order of their tokens; it replaces the one of the same options and device."""

    def measured(one: dict[str, object]) -> tuple[object, object]:
        return one["options"], one["device"]

    others = [one for one in runs if measured(one) != measured(run)]
    return sorted([*others, run], key=lambda one: (one["device"], one["options"]["tokens"]))


def peak_by_proportion(loss: str, run: dict[str, object], runs: list[dict[str, object]]) -> tuple[float, int] | None:
    """What the plain version would take in a run that left it out: bytes, and the tokens of the run they come from.

    That is the one with the most tokens of those with the same settings that measured it; without one, None.
    """

    def setting(one: dict[str, object]) -> dict[str, object]:
        free = ("tokens", "repeats", "versions", "losses")
        return {key: value for key, value in one["options"].items() if key not in free} | {"device": one["device"]}

    peaks = {
        one["options"]["tokens"]: comparison["versions"]["plain"]["peak_bytes"]
        for one in runs
        for comparison in one["comparisons"]
        if setting(one) == setting(run) and comparison["loss"] == loss and comparison["versions"].get("plain")
    }
    if not peaks:
        return None
    tokens = max(peaks)
    return peaks[tokens] * run["options"]["tokens"] / tokens, tokens


def table(runs: list[dict[str, object]]) -> str:
    """Peaks and times of all runs as Markdown, and below it what was run."""
    lines = ["| run | tokens | loss | version | peak of the loss part | seconds | peak, plain = 1 | time, plain = 1 |",
             "| ---: | --- | --- | --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for number, run in enumerate(runs, start=1):
        options = run["options"]
        for comparison in run["comparisons"]:
            entries = comparison["versions"]
            for version in VERSIONS:
                cells = [str(number), f"{options['rows']} × {options['tokens']:,}", LOSSES[comparison["loss"]],
                         VERSIONS[version]]  # fmt: skip
                if entries.get(version):
                    cells += measured_cells(entries[version], entries.get("plain"))
                elif version in entries:
                    cells += ["did not fit", "", "", ""]
                elif version == "plain":
                    cells += [not_measured(peak_by_proportion(comparison["loss"], run, runs)), "", "", ""]
                else:
                    continue
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n" + "\n".join(f"{n}. {caption(run)}" for n, run in enumerate(runs, start=1))


def measured_cells(entry: dict[str, object], plain: dict[str, object] | None) -> list[str]:
    """Peak, seconds and their ratios to the plain version, if that was measured."""
    seconds = statistics.median(entry["seconds"])
    cells = [f"{entry['peak_bytes'] / 2**30:.2f} GiB", f"{seconds:.2f}"]
    if plain is None:
        return [*cells, "", ""]
    times = seconds / statistics.median(plain["seconds"])
    return [*cells, f"{entry['peak_bytes'] / plain['peak_bytes']:.3f}", f"{times:.2f}"]


def not_measured(proportional: tuple[float, int] | None) -> str:
    """The peak's cell of a plain version that was left out."""
    if proportional is None:
        return "—"
    return f"—, by proportion {proportional[0] / 2**30:.1f} GiB from the run at {proportional[1]:,} tokens"


def caption(run: dict[str, object]) -> str:
    """What a run measured, where."""
    options = run["options"]
    text = (
        f"V = {options['vocabulary_size']:,}, hidden states {options['student_width']} and {options['teacher_width']} "
        f"wide, {options['precision']}, {run['device']}, {run['threads']} threads, torch {run['versions']['torch']}; "
        f"median of {options['repeats']}."
    )
    differences = [c["gradient_difference"] for c in run["comparisons"] if "gradient_difference" in c]
    if differences:
        text += f" The gradients of the output layer differ by {max(differences):.1e} of their norm at most."
    return text
