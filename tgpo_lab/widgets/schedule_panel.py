"""The schedule of the teacher's weight against reward and agreement of a stored run."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import ipywidgets
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..errors import InputError
from ..metrics import metrics_frame, read_rows
from ..runs import METRICS_FILE, RunResult, read_config
from ..schedules import Schedule, parse_schedule
from .panel import Panel


def schedule_table(run: str | os.PathLike | RunResult, schedule: Schedule | None = None) -> pd.DataFrame:
    """What a run has logged at each step, and what another schedule would have given there.

    Args:
        run: the folder of a run, or its result.
        schedule: another schedule; it observes the agreement that THIS run had. Another weight would have led to
            another agreement, so for a schedule that reacts to it this is a first look and no forecast.

    Returns:
        One row a step: ``step``, ``weight`` (NaN for a method without one), ``reward``, ``agreement``, and
        ``other_weight`` if a schedule is given.

    Raises:
        InputError: no run there, or one without a step.
    """
    if isinstance(run, RunResult):
        metrics, name = run.metrics, run.directory
    else:
        name = Path(run)
        read_config(name)
        metrics = metrics_frame(read_rows(name / METRICS_FILE))
    table = metrics[["step", "weight", "reward", "agreement"]].dropna(subset=["reward"]).reset_index(drop=True)
    if table.empty:
        raise InputError(f"{name} has not logged a step yet. Give a run with at least one.")
    if schedule is not None:
        replayed, weights = copy.deepcopy(schedule), []
        for step, agreement in zip(table["step"].tolist(), table["agreement"].tolist(), strict=True):
            weights.append(replayed(step))
            replayed.observe(step, agreement)
        table["other_weight"] = weights
    return table


def schedule_figure(table: pd.DataFrame, step: int | None = None) -> Figure:
    """Weight above reward and agreement, all over steps; ``table`` as :func:`schedule_table` gives it."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7.6, 3.9), layout="constrained", sharex=True)
    weights = ["weight", *(["other_weight"] if "other_weight" in table else [])]
    for column, line, label in zip(weights, ("-", "--"), ("of the run", "other schedule"), strict=False):
        top.plot(table["step"], table[column], line, color="#8172b3", label=label, linewidth=1.8)
    top.set_ylabel("weight w")
    top.set_ylim(0, 1.08 * max(1e-9, table[weights].max().max()))
    if len(weights) > 1:
        top.legend(frameon=False, fontsize=9)
    for column, line, color, marker in (("reward", "-", "#4c72b0", "o"), ("agreement", "--", "#dd8452", "s")):
        every = max(1, len(table) // 8)
        bottom.plot(
            table["step"], table[column], line, color=color, label=column, marker=marker, markevery=every, markersize=4
        )
    bottom.set_ylim(-0.03, 1.03)
    bottom.set_ylabel("0 to 1")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.set_xlabel("step (batches learned from)")
    bottom.legend(frameon=False, fontsize=9)
    if step is not None:
        for axes in (top, bottom):
            axes.axvline(step, color="gray", linewidth=1)
    return figure


def schedule_panel(run: str | os.PathLike | RunResult) -> Panel:
    """Move along a run's steps, and lay another schedule over its own.

    Args:
        run: the folder of a run, or its result.

    Raises:
        InputError: no run there, or one without a step.
    """
    steps = schedule_table(run)["step"].tolist()
    place = ipywidgets.SelectionSlider(
        options=steps, value=steps[0], description="step", layout=ipywidgets.Layout(width="420px", max_width="100%")
    )
    other = ipywidgets.Text(
        placeholder="UntilAgreement(0.02, agreement=0.95)",
        description="other schedule",
        continuous_update=False,
        style={"description_width": "initial"},
        layout=ipywidgets.Layout(width="420px", max_width="100%"),
    )

    def compute() -> tuple[pd.DataFrame, str]:
        schedule, fault = None, ""
        if other.value.strip():
            try:
                schedule = parse_schedule(other.value)
            except InputError as error:
                fault = str(error)
        table = schedule_table(run, schedule)
        here = table[table["step"] == place.value].iloc[0].drop("step")
        numbers = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in here.items())
        return table, fault or f"step {place.value}: {numbers}"

    return Panel([place, other], compute, lambda table: schedule_figure(table, place.value), "A schedule")
