"""Figures of a study, from its stored results alone. Nothing is told by colour alone."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from ..errors import InputError
from ..plots import LIGHT, LINE_STYLES, MARKERS, style
from .statistics import mean_interval

PANEL = 4.2  # inches wide


def _figure(width: float, height: float) -> Figure:
    figure = plt.figure(figsize=(width, height), layout="constrained")
    plt.close(figure)  # shown by whoever asked for it, once
    return figure


def curves(
    steps: pd.DataFrame, labels: Sequence[str], column: str = "accuracy", unit: str = "held-out accuracy"
) -> Figure:
    """A measurement over steps: mean over seeds and 95 % bootstrap interval, a panel for each pair.

    Raises:
        InputError: none of the labels has a measurement.
    """
    shown = steps[steps["label"].isin(list(labels))].dropna(subset=[column])
    if shown.empty:
        raise InputError(f"There is nothing to draw: no run of {', '.join(labels)} has measured {column}.")
    pairs = list(dict.fromkeys(shown["pair"]))
    palette = dict(zip(labels, sns.color_palette("colorblind", len(labels)), strict=True))
    with sns.axes_style("ticks"), mpl.rc_context(style(LIGHT)):
        figure = _figure(PANEL * len(pairs), 3.6)
        axes = figure.subplots(1, len(pairs), sharey=True, squeeze=False)[0]
        for panel, pair in zip(axes, pairs, strict=True):
            for number, label in enumerate(labels):
                rows = shown[(shown["pair"] == pair) & (shown["label"] == label)]
                if rows.empty:
                    continue
                points = [(step, mean_interval(group[column].to_numpy())) for step, group in rows.groupby("step")]
                x = [step for step, _ in points]
                panel.fill_between(
                    x, [i.low for _, i in points], [i.high for _, i in points], color=palette[label], alpha=0.2, lw=0
                )
                panel.plot(
                    x, [i.mean for _, i in points], color=palette[label], label=label, markersize=4,
                    linestyle=LINE_STYLES[number % len(LINE_STYLES)], marker=MARKERS[number % len(MARKERS)],
                )  # fmt: skip
            panel.set(title=pair, xlabel="step (batches learned from)")
        axes[0].set_ylabel(unit)
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), frameon=False)
    return figure


def ranking(runs: pd.DataFrame, column: str = "area", unit: str = "mean held-out accuracy over the run") -> Figure:
    """A dot with its 95 % interval for each method, best on top, every seed as a small mark; a panel for each pair."""
    pairs = list(dict.fromkeys(runs["pair"]))
    count = runs["label"].nunique()
    color = sns.color_palette("colorblind")[0]
    with sns.axes_style("ticks"), mpl.rc_context(style(LIGHT)):
        figure = _figure((PANEL + 1) * len(pairs), 1.2 + 0.27 * count)
        for panel, pair in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
            of_pair = runs[runs["pair"] == pair].assign(**{column: lambda frame: frame[column].fillna(0.0)})
            order = of_pair.groupby("label")[column].mean().sort_values().index
            for place, label in enumerate(order):
                values = of_pair.loc[of_pair["label"] == label, column].to_numpy()
                interval = mean_interval(values)
                panel.plot(values, np.full(len(values), place), "|", color="0.6", markersize=7, zorder=1)
                panel.plot([interval.low, interval.high], [place, place], color=color, linewidth=2.2)
                panel.plot(interval.mean, place, "o", color=color, markersize=5.5)
            panel.set_yticks(range(len(order)), order)
            panel.set(title=pair, xlabel=unit, xlim=(-0.03, 1.03))
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
