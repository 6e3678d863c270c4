"""Comparing runs in numbers: how fast, how well, how close to the teacher. Functions of metrics alone."""

from __future__ import annotations

import io
from collections.abc import Mapping

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from ..errors import InputError
from ..metrics import steps_to
from ..runs import RunResult

ACCURACY_BEFORE, ACCURACY_AFTER = "accuracy before", "accuracy after"
STEPS_TO_50, STEPS_TO_80 = "steps to 50 %", "steps to 80 %"
REVERSE_KL, LENGTH, GRADIENT_NORM = "reverse KL to the teacher", "mean length at the end", "largest gradient norm"
UNITS = {REVERSE_KL: "nats", LENGTH: "tokens"}


def summary_table(
    runs: Mapping[str, RunResult],
    before: Mapping[str, float] | None = None,
    after: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """One row per run: accuracy before and after, speed, and the state at the end.

    Accuracies are from 0 to 1. Steps count batches and refer to held-out accuracy, missing (``pd.NA``)
    where the level was never measured. Reverse KL (nats) and mean length (tokens) are the last ones
    measured in training, the gradient norm is the largest of the run, before clipping. ``attrs["accuracy"]``
    says on what the two accuracies were measured.

    Args:
        runs: label → run.
        before: label → accuracy on the test prompts before training.
        after: the same after training. Without the two, the first and the last held-out accuracy of
            each run stand in their place.

    Raises:
        InputError: no runs; one of ``before`` and ``after`` alone, or without one of the runs.
    """
    if not runs:
        raise InputError("There is nothing to compare: give at least one run.")
    if (before is None) != (after is None):
        raise InputError("Give both the accuracies before and those after training, or neither.")
    for given in (before, after):
        if given is not None and (missing := [name for name in runs if name not in given]):
            known = ", ".join(given) or "none"
            raise InputError(f"There is no accuracy for {missing[0]!r}: those given are for {known}.")
    rows = {}
    for name, run in runs.items():
        metrics = run.metrics.sort_values("step")
        rows[name] = {
            ACCURACY_BEFORE: _edge(metrics["accuracy"], 0) if before is None else before[name],
            ACCURACY_AFTER: _edge(metrics["accuracy"], -1) if after is None else after[name],
            STEPS_TO_50: steps_to(metrics, 0.5),
            STEPS_TO_80: steps_to(metrics, 0.8),
            REVERSE_KL: _edge(metrics["reverse_kl"], -1),
            LENGTH: _edge(metrics["length"], -1),
            GRADIENT_NORM: float(metrics["gradient_norm"].max()),
        }
    table = pd.DataFrame.from_dict(rows, orient="index").astype({STEPS_TO_50: "Int64", STEPS_TO_80: "Int64"})
    table.index.name = "method"
    table.attrs["accuracy"] = "held-out prompts of the run" if before is None else "test prompts"
    return table


def _edge(values: pd.Series, place: int) -> float:
    """First (0) or last (−1) value measured; NaN if there is none."""
    measured = values.dropna()
    return float("nan") if measured.empty else float(measured.iloc[place])


def percent(share: float) -> str:
    """A share from 0 to 1 as text, for example ``12.5 %``."""
    return f"{100 * share:.1f} %"


def table_texts(table: pd.DataFrame) -> pd.DataFrame:
    """The cells of :func:`summary_table` as texts.

    "never" stands where a level was not reached, "–" where nothing was measured.
    """

    def text(column: str, value: object) -> str:
        if pd.isna(value):  # type: ignore[arg-type]
            return "never" if column in (STEPS_TO_50, STEPS_TO_80) else "–"
        if column in (ACCURACY_BEFORE, ACCURACY_AFTER):
            return percent(value)  # type: ignore[arg-type]
        if column in (STEPS_TO_50, STEPS_TO_80):
            return str(value)
        return f"{value:.1f}" if column == LENGTH else f"{value:.3g}"

    cells = {column: [text(column, value) for value in table[column]] for column in table.columns}
    return pd.DataFrame(cells, index=table.index)


def format_table(table: pd.DataFrame, width: int = 100) -> str:
    """:func:`summary_table` for a terminal of ``width`` characters, with a line that says what was measured."""
    # Spaces instead of lines between the columns: so the headings fit 80 characters.
    drawn = Table("method", caption=caption(table), caption_justify="left", box=box.SIMPLE_HEAD)
    drawn.pad_edge, drawn.collapse_padding = False, True
    for column in table.columns:
        unit = UNITS.get(column)
        heading = f"{column} ({unit})" if unit else column
        drawn.add_column(heading, justify="right", min_width=max(len(word) for word in heading.split()))
    for name, cells in table_texts(table).iterrows():
        drawn.add_row(str(name), *cells)
    target = io.StringIO()
    Console(file=target, width=width, color_system=None, markup=False, emoji=False).print(drawn)
    return target.getvalue()


def caption(table: pd.DataFrame) -> str:
    """What the columns of :func:`summary_table` were measured on, in one sentence."""
    return (
        f"Accuracy: share of {table.attrs['accuracy']} answered rightly by greedy decoding. Steps: batches until "
        "held-out accuracy was first measured at or above the level. Reverse KL and length: last measured in training."
    )
