"""Stored results of studies: tidy Parquet tables, made from the cells alone.

DATA/results/NAME/runs.parquet    one row a run: pair, label, seed, accuracy, speed, stability, configuration
DATA/results/NAME/steps.parquet   one row a step of a run: the measurements of docs/metrics.md
DATA/results/NAME/looks.parquet   of studies that look into checkpoints: one row a look
DATA/results/NAME/study.json      question, command, versions, seeds, time
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import InputError
from ..files import write_json, written_folder
from ..metrics import METRICS, metrics_frame, steps_to
from ..models.pairs import DATA
from .plan import DIALS, Study
from .runner import result_file

RESULTS = DATA / "results"
TABLES = ("runs", "steps", "looks")
# Times differ from machine to machine; the whole run's are kept in `seconds`.
STEP_COLUMNS = [name for name in METRICS if not name.startswith("seconds_")]
LOSABLE = 0.2  # accuracy below which there is nothing to lose
RUNAWAY_SHARE = 0.5
LAST_STEPS = 5


@dataclass(frozen=True)
class StudyResults:
    """What a study has measured."""

    runs: pd.DataFrame
    """One row a run."""
    steps: pd.DataFrame
    """One row a step of a run; ``cell`` says of which."""
    looks: pd.DataFrame
    """What the study looked at in checkpoints; empty where it did not."""
    about: dict
    """Question, command, versions, seeds, time."""


def load_results(name: str, folder: Path = RESULTS) -> StudyResults:
    """Stored results of a study.

    Raises:
        InputError: there are none, or they cannot be read.
    """
    place = folder / name
    if not place.exists():
        raise InputError(f"There are no results of a study {name!r} in {folder}. Run: tgpo-lab study {name}")
    try:
        about = json.loads((place / "study.json").read_text())
        tables = {table: pd.read_parquet(place / f"{table}.parquet") for table in TABLES}
    except (OSError, ValueError) as error:
        raise InputError(
            f"The results of the study {name!r} in {folder} cannot be read ({error}). Restore {place} or remove it, "
            f"then run: tgpo-lab study {name}"
        ) from error
    for table, frame in tables.items():
        if "pair" in frame:  # a pair of the map at −5 nats before one at −13: digits read as numbers
            tables[table] = frame.sort_values(
                "pair", key=lambda pairs: pairs.map(_numbers_as_numbers), kind="stable", ignore_index=True
            )
    return StudyResults(**tables, about=about)


def _numbers_as_numbers(name: str) -> tuple[str | float, ...]:
    return tuple(float(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+\.?\d*)", name)))


def complete_results(name: str, folder: Path = RESULTS) -> StudyResults | None:
    """Stored results of a study of which every run is finished; None for any other."""
    if not (folder / name).exists():
        return None
    results = load_results(name, folder)
    return results if results.about["runs_finished"] == results.about["runs_planned"] else None


def finished_fingerprints(name: str, folder: Path = RESULTS) -> frozenset[str]:
    """Fingerprints of the runs whose results are stored."""
    return frozenset(load_results(name, folder).runs["fingerprint"]) if (folder / name).exists() else frozenset()


def gather(study: Study, output: Path, folder: Path = RESULTS, *, discard_old: bool = False) -> StudyResults:
    """Put the finished cells of ``output`` beside what is stored of the study already, and store both.

    Args:
        study: the study.
        output: folder that :func:`tgpo_lab.studies.runner.run_study` wrote to.
        folder: where results are stored; the study's own folder in it is written anew, whole or not at all.
        discard_old: drop stored runs that are not of the study as it is now.

    Raises:
        InputError: not one run is finished; stored runs are of another configuration; or runs of one pair started
            from different models.
    """
    wanted = {cell.fingerprint: cell for cell in study.cells()}
    frames: dict[str, list[pd.DataFrame]] = {table: [] for table in TABLES}
    made_by: list[dict] = []
    if (folder / study.name).exists():
        before = load_results(study.name, folder)
        kept = before.runs[before.runs["fingerprint"].isin(list(wanted))]
        if len(kept) < len(before.runs) and not discard_old:
            raise InputError(
                f"{len(before.runs) - len(kept)} of {len(before.runs)} runs stored in {folder / study.name} are of "
                f"another configuration than the study {study.name} has now. To drop them, give --discard-old."
            )
        frames["runs"].append(kept)
        for table in ("steps", "looks"):
            rows = getattr(before, table)
            frames[table].append(rows[rows["cell"].isin(kept["cell"])])
        made_by += before.about["made_by"]
        wanted = {key: cell for key, cell in wanted.items() if key not in set(kept["fingerprint"])}
    new = [json.loads(file.read_text()) for cell in wanted.values() if (file := result_file(cell, output)).exists()]
    new = [content for content in new if content["fingerprint"] in wanted]
    frames["runs"].append(pd.DataFrame([run_row(content) for content in new]))
    frames["steps"] += [_steps_frame(content) for content in new]
    frames["looks"] += [_of_cell(pd.DataFrame(content["looks"]), content) for content in new]
    made_by += [content["made_by"] for content in new]
    if all(frame.empty for frame in frames["runs"]):
        raise InputError(f"No run of the study {study.name!r} is finished yet. Run: tgpo-lab study {study.name}")
    whole = {table: _joined(parts) for table, parts in frames.items()}
    all_runs = whole["runs"].sort_values(["pair", "label", "seed"], ignore_index=True)
    for pair, of_pair in all_runs.groupby("pair"):
        if of_pair["pair_digest"].nunique() > 1:
            raise InputError(
                f"Runs on the pair {pair!r} started from different models: it was built anew in between. Nothing was "
                f"stored. Remove the newer runs ({output}) or drop the older ones."
            )
    about = {
        "study": study.name,
        "question": study.question,
        "runs_planned": len(study.cells()),
        "runs_finished": len(all_runs),
        "seeds": [int(seed) for seed in sorted(all_runs["seed"].unique())],
        "settings": dict(study.settings),
        "references": list(study.references),
        "run_minutes": round(float(all_runs["seconds"].sum()) / 60, 1),
        "made_by": _distinct(made_by),
    }
    results = StudyResults(
        all_runs,
        whole["steps"].sort_values(["cell", "step"], ignore_index=True),
        whole["looks"].sort_values(["cell", "step"], ignore_index=True, kind="stable"),
        about,
    )
    with written_folder(folder / study.name) as writing:
        for table in TABLES:
            getattr(results, table).to_parquet(writing / f"{table}.parquet", index=False, compression="zstd")
        write_json(writing / "study.json", about)
    return results


def _joined(frames: list[pd.DataFrame]) -> pd.DataFrame:
    filled = [frame for frame in frames if not frame.empty]  # an empty one has no types of its own
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=["cell", "step"])


def run_row(content: dict) -> dict[str, object]:
    """One row about a run, from its cell's file.

    ``area`` is the mean of held-out accuracy over the planned run (trapezoidal rule over steps, divided by their
    number). A run whose numbers stopped being finite has an accuracy of 0 from there on. ``lost``: held-out accuracy
    was 0.2 or more and ended at half of its maximum or below. ``runaway``: half of the last responses were cut at the
    token limit. ``collapsed``: either, or numbers that stopped being finite.
    """
    metrics = metrics_frame(content["steps"])
    failed = content["failure"] is not None
    accuracy = _accuracy(content, metrics)
    steps, values = accuracy["step"].to_numpy(dtype=float), accuracy["accuracy"].to_numpy(dtype=float)
    last = metrics.dropna(subset=["reward"]).tail(LAST_STEPS)
    lost = bool(values.max() >= LOSABLE and values[-1] <= values.max() / 2)
    runaway = bool(last["truncated"].mean() >= RUNAWAY_SHARE)
    return {
        "cell": content["cell"],
        "pair": content["pair"],
        "label": content["label"],
        "seed": content["seed"],
        "accuracy_before": values[0],
        "test_accuracy": 0.0 if content["test_accuracy"] is None else content["test_accuracy"],
        "area": np.trapezoid(values, steps) / (steps[-1] - steps[0]),
        "steps_to_50": steps_to(accuracy, 0.5),
        "steps_to_80": steps_to(accuracy, 0.8),
        "steps_to_95": steps_to(accuracy, 0.95),
        "largest_gradient_norm": metrics["gradient_norm"].max(),
        "largest_length": metrics["length"].max(),
        "largest_entropy": metrics["entropy"].max(),
        "last_length": last["length"].mean(),
        "last_truncated": last["truncated"].mean(),
        "last_entropy": last["entropy"].mean(),
        "last_agreement": last["agreement"].mean(),
        "lost": lost,
        "runaway": runaway,
        "collapsed": failed or lost or runaway,
        "failure": content["failure"] or "",
        **{dial: content["dials"].get(dial, np.nan) for dial in DIALS},
        "pair_digest": content["pair_digest"],
        "seconds": content["seconds"],
        "fingerprint": content["fingerprint"],
        "config": json.dumps(content["config"]),
    }


def _accuracy(content: dict, metrics: pd.DataFrame) -> pd.DataFrame:
    """Measured accuracy by step; of a failed run with zeros from its failure to the end that was planned."""
    measured = metrics.dropna(subset=["accuracy"])[["step", "accuracy"]].sort_values("step")
    if content["failure"] is None:
        return measured
    planned, every = content["config"]["steps"], content["config"]["evaluate_every"]
    first = int(measured["step"].max()) + every if len(measured) else 0
    steps = sorted({*range(first, planned, every), planned})
    return pd.concat([measured, pd.DataFrame({"step": steps, "accuracy": 0.0})], ignore_index=True)


def _steps_frame(content: dict) -> pd.DataFrame:
    metrics = metrics_frame(content["steps"])
    padding = _accuracy(content, metrics)
    padding = padding[~padding["step"].isin(metrics["step"])]
    frame = pd.concat([metrics, padding], ignore_index=True) if len(padding) else metrics
    frame = frame[["step", *STEP_COLUMNS]]
    return _of_cell(frame.astype(dict.fromkeys(STEP_COLUMNS, np.float32)), content)


def _of_cell(frame: pd.DataFrame, content: dict) -> pd.DataFrame:
    for place, name in enumerate(("cell", "pair", "label", "seed")):
        frame.insert(place, name, content[name])
    return frame


def _distinct(entries: list[dict]) -> list[dict]:
    """Provenance without the times, each combination once, with the first and the last time."""
    distinct: dict[str, dict] = {}
    for entry in entries:
        first, last = entry.get("first", entry.get("time")), entry.get("last", entry.get("time"))
        rest = {key: value for key, value in entry.items() if key not in ("time", "first", "last")}
        known = distinct.setdefault(json.dumps(rest, sort_keys=True), {**rest, "first": first, "last": last})
        known["first"], known["last"] = min(known["first"], first), max(known["last"], last)
    return list(distinct.values())
