"""Figures of a study, from its stored results alone. Nothing is told by colour alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..errors import InputError
from ..plots import LIGHT, LINE_STYLES, MARKERS, legend_columns, style
from .statistics import mean_interval

PANEL = 4.2  # inches wide
SHARE = (0.0, 1.0)


def _figure(width: float, height: float) -> Figure:
    figure = plt.figure(figsize=(width, height), layout="constrained")
    plt.close(figure)  # shown by whoever asked for it, once
    return figure


def _panels(count: int, width: float, height: float, *, share_y: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure of panels, ``width`` × ``height`` inches each, at most three in a row."""
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    figure = _figure(width * columns, height * rows)
    axes = figure.subplots(rows, columns, sharey=share_y, squeeze=False).flatten().tolist()
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _label_first(axes: Sequence[Axes], text: str) -> None:
    """Name the shared vertical axis at the first panel of each row."""
    for panel in axes:
        if panel.get_subplotspec().is_first_col():
            panel.set_ylabel(text)


def _legend(figure: Figure, axes: Axes, title: str | None = None) -> None:
    """One legend for all panels, below them, in as many columns as there is room for."""
    handles, names = axes.get_legend_handles_labels()
    columns = legend_columns(names, figure.get_figwidth())
    figure.set_figheight(figure.get_figheight() + 0.24 * (math.ceil(len(names) / columns) + (title is not None)))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, title=title)


def curves(
    steps: pd.DataFrame,
    labels: Sequence[str],
    column: str = "accuracy",
    unit: str = "held-out accuracy, sampled",
    *,
    bounds: tuple[float, float] = SHARE,
) -> Figure:
    """A measurement over steps: mean over seeds and 95 % interval, a panel for each pair.

    Args:
        steps: one row a step of a run.
        labels: what is shown, one line each.
        column: the measurement.
        unit: what its axis says.
        bounds: values that are possible; intervals are cut there.

    Raises:
        InputError: none of the labels has a measurement.
    """
    shown = steps[steps["label"].isin(list(labels))].dropna(subset=[column])
    if shown.empty:
        raise InputError(f"There is nothing to draw: no run of {', '.join(labels)} has measured {column}.")
    pairs = list(dict.fromkeys(shown["pair"]))
    palette = dict(zip(labels, sns.color_palette("colorblind", len(labels)), strict=True))
    with sns.axes_style("ticks"), mpl.rc_context(style(LIGHT)):
        figure, axes = _panels(len(pairs), PANEL, 3.2)
        for panel, pair in zip(axes, pairs, strict=True):
            for number, label in enumerate(labels):
                rows = shown[(shown["pair"] == pair) & (shown["label"] == label)]
                if rows.empty:
                    continue
                points = [
                    (step, mean_interval(group[column].to_numpy(), bounds)) for step, group in rows.groupby("step")
                ]
                x = [step for step, _ in points]
                panel.fill_between(
                    x, [i.low for _, i in points], [i.high for _, i in points], color=palette[label], alpha=0.2, lw=0
                )
                panel.plot(
                    x, [i.mean for _, i in points], color=palette[label], label=label, markersize=4,
                    linestyle=LINE_STYLES[number % len(LINE_STYLES)], marker=MARKERS[number % len(MARKERS)],
                )  # fmt: skip
            panel.set(title=pair, xlabel="step (batches learned from)")
            if bounds == SHARE:
                panel.set_ylim(-0.03, 1.05)
        _label_first(axes, unit)
        _legend(figure, axes[0])
    return figure


def ranking(runs: pd.DataFrame, column: str = "area", unit: str = "mean held-out accuracy over the run") -> Figure:
    """A dot with its 95 % interval for each method, best on top, every seed as a small mark; a panel for each pair."""
    pairs = list(dict.fromkeys(runs["pair"]))
    count = runs["label"].nunique()
    color = sns.color_palette("colorblind")[0]
    with sns.axes_style("ticks"), mpl.rc_context(style(LIGHT)):
        figure, axes = _panels(len(pairs), PANEL + 1, 1.2 + 0.27 * count, share_y=False)
        for panel, pair in zip(axes, pairs, strict=True):
            of_pair = runs[runs["pair"] == pair]
            order = of_pair.groupby("label")[column].mean().sort_values().index
            for place, label in enumerate(order):
                values = of_pair.loc[of_pair["label"] == label, column].to_numpy()
                interval = mean_interval(values, SHARE)
                panel.plot(values, np.full(len(values), place), "|", color="0.6", markersize=7, zorder=1)
                panel.plot([interval.low, interval.high], [place, place], color=color, linewidth=2.2)
                panel.plot(interval.mean, place, "o", color=color, markersize=5.5)
            panel.set_yticks(range(len(order)), order)
            low = of_pair[column].min()
            panel.set(title=pair, xlabel=unit, xlim=(-0.03 if low < 0.6 else 0.98 * low, 1.03 if low < 0.6 else 1.005))
        _label_first(axes, "method")
    return figure


def heatmap(table: pd.DataFrame, title: str, unit: str, *, diverging: bool = False) -> Figure:
    """A table of numbers as coloured cells with the numbers in them.

    Args:
        table: index and columns are the axes, with their names; cells are numbers.
        title: of the figure.
        unit: of the colour scale.
        diverging: a scale with white at zero; otherwise from 0 to 1.
    """
    with sns.axes_style("white"), mpl.rc_context({**style(LIGHT), "axes.grid": False}):
        figure = _figure(1.6 + 1.15 * table.shape[1], 1.4 + 0.6 * table.shape[0])
        axes = figure.subplots()
        scale = (
            {"cmap": "PuOr_r", "center": 0, "vmin": -1, "vmax": 1}
            if diverging
            else {"cmap": "cividis", "vmin": 0, "vmax": 1}
        )
        sns.heatmap(
            table, annot=True, fmt="+.2f" if diverging else ".2f", ax=axes, linewidths=1, linecolor="white",
            cbar_kws={"label": unit}, **scale,
        )  # fmt: skip
        axes.set_title(title, loc="left")
        axes.tick_params(axis="y", rotation=0)
    return figure


def by_depth(
    table: pd.DataFrame,
    columns: Sequence[str],
    unit: str = "share with the right answer",
    bounds: tuple[float, float | None] = (-0.04, 1.04),
) -> Figure:
    """Measurements over the length of the prefix, a panel for each pair; ``depth`` is in tokens."""
    pairs = list(dict.fromkeys(table["pair"]))
    palette = sns.color_palette("colorblind", len(columns))
    with sns.axes_style("ticks"), mpl.rc_context(style(LIGHT)):
        figure, axes = _panels(len(pairs), 0.8 * PANEL, 3.0)
        for panel, pair in zip(axes, pairs, strict=True):
            rows = table[table["pair"] == pair].sort_values("depth")
            for number, column in enumerate(columns):
                panel.plot(
                    rows["depth"], rows[column], color=palette[number], label=column, markersize=4,
                    linestyle=LINE_STYLES[number % len(LINE_STYLES)], marker=MARKERS[number % len(MARKERS)],
                )  # fmt: skip
            panel.set(title=pair, xlabel="prefix (tokens of the student)")
        axes[0].set_ylim(bounds)  # for all panels, and only now: an end that is left open follows what is drawn
        _label_first(axes, unit)
        _legend(figure, axes[0])
    return figure


def over_divergence(start: pd.DataFrame, columns: Mapping[str, str]) -> Figure:
    """Quantities before training against divergence, on a logarithmic axis.

    Args:
        start: one row for each divergence; the index is the log-probability of the teacher's opening in nats.
        columns: column → what the legend says, unit included.
    """
    palette = sns.color_palette("colorblind", len(columns))
    with sns.axes_style("ticks"), mpl.rc_context(style(LIGHT)):
        figure, axes = _panels(1, 1.6 * PANEL, 3.6)
        for number, (column, name) in enumerate(columns.items()):
            axes[0].plot(
                -start.index, start[column], color=palette[number], label=name,
                linestyle=LINE_STYLES[number % len(LINE_STYLES)], marker=MARKERS[number % len(MARKERS)],
            )  # fmt: skip
        axes[0].set(
            xlabel="divergence: −log-probability of the teacher's opening (nats)",
            ylabel="before training (units: see legend)",
            yscale="log",
        )
        _legend(figure, axes[0])
    return figure


def along_training(looks: pd.DataFrame, column: str, unit: str, scale: str = "log") -> Figure:
    """A quantity along training, a panel for each method, a line for each divergence; ``scale`` log or linear."""
    labels = list(dict.fromkeys(looks["label"]))
    levels = sorted(looks["divergence"].unique(), reverse=True)
    palette = sns.color_palette("cividis", len(levels))
    with sns.axes_style("ticks"), mpl.rc_context(style(LIGHT)):
        figure, axes = _panels(len(labels), 0.8 * PANEL, 3.0)
        for panel, label in zip(axes, labels, strict=True):
            for number, level in enumerate(levels):
                rows = looks[(looks["label"] == label) & (looks["divergence"] == level)]
                means = rows.groupby("step")[column].mean()
                panel.plot(
                    means.index, means, color=palette[number], label=f"{level:g} nats", markersize=4,
                    linestyle=LINE_STYLES[number % len(LINE_STYLES)], marker=MARKERS[number % len(MARKERS)],
                )  # fmt: skip
            panel.set(title=label, xlabel="step (batches learned from)", yscale=scale)
        _label_first(axes, unit)
        _legend(figure, axes[0], "log-probability of the teacher's opening before training")
    return figure


def against_tokens(steps: pd.DataFrame) -> Figure:
    """Held-out accuracy against the teacher tokens learned from so far: a thin line a seed, a panel for each pair."""
    pairs, labels = list(dict.fromkeys(steps["pair"])), list(dict.fromkeys(steps["label"]))
    palette = sns.color_palette("colorblind", len(labels))
    with sns.axes_style("ticks"), mpl.rc_context(style(LIGHT)):
        figure, axes = _panels(len(pairs), PANEL, 3.2)
        for panel, pair in zip(axes, pairs, strict=True):
            for number, label in enumerate(labels):
                rows = steps[(steps["pair"] == pair) & (steps["label"] == label)]
                for place, (_, run) in enumerate(rows.groupby("cell")):
                    panel.plot(
                        run["teacher_tokens"] / 1000, run["accuracy"], color=palette[number], linewidth=1, alpha=0.7,
                        linestyle=LINE_STYLES[number % len(LINE_STYLES)], marker=MARKERS[number % len(MARKERS)],
                        markersize=3, label=label if place == 0 else None,
                    )  # fmt: skip
            panel.set(title=pair, xlabel="teacher tokens learned from (thousands)", ylim=(-0.04, 1.04))
        _label_first(axes, "held-out accuracy")
        _legend(figure, axes[0])
    return figure
