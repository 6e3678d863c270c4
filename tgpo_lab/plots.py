"""Figures of runs, one call each. A figure is returned: nothing is shown, nothing stays open in pyplot."""

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
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, SymmetricalLogLocator

from .errors import InputError
from .metrics import METRICS
from .runs import RunResult

DEFAULT_COLUMNS = (
    "accuracy", "reward", "length", "entropy", "reverse_kl", "agreement", "rejected", "gradient_norm", "weight",
)  # fmt: skip
# Style and marker tell runs apart where colour cannot: on a grey print, to a colour-blind reader.
LINE_STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MARKERS_PER_LINE = 8
# On these a shortened axis would make a small difference look like a large one.
FULL_RANGE = {"accuracy", "reward", "agreement"}
PANEL_WIDTH, PANEL_HEIGHT, PANELS_IN_A_ROW = 3.6, 2.7, 3  # inches, so that three panels fill a notebook cell
DARK = {"background": "#16191d", "text": "#e6e6e6", "grid": "#3a4048"}
LIGHT = {"background": "#ffffff", "text": "#1a1a1a", "grid": "#dcdcdc"}


def plot_runs(
    runs: Mapping[str, RunResult] | Mapping[str, pd.DataFrame],
    columns: Sequence[str] | None = None,
    *,
    dark: bool = False,
) -> Figure:
    """Measurements over steps: one panel per column, one line per run, one legend for all panels.

    Args:
        runs: label → run, or its metrics (columns of :data:`tgpo_lab.metrics.METRICS` and ``step``).
        columns: names of :data:`tgpo_lab.metrics.METRICS`; by default those of :data:`DEFAULT_COLUMNS`
            that at least one run has measured.
        dark: for a dark page.

    Raises:
        InputError: no runs, an unknown column, no columns, or no run with a measurement.
    """
    if not runs:
        raise InputError("There is nothing to plot: give at least one run.")
    frames = {name: run.metrics if isinstance(run, RunResult) else run for name, run in runs.items()}
    if columns is None:
        columns = [c for c in DEFAULT_COLUMNS if any(len(measured_points(f, c)) for f in frames.values())]
    if not columns or all(frame.empty for frame in frames.values()):
        raise InputError("There is nothing to plot: no columns are given, or none of the runs has a measurement yet.")
    if unknown := [column for column in columns if column not in METRICS]:
        raise InputError(f"Unknown column {unknown[0]!r}: choose from {', '.join(METRICS)}.")

    width = min(len(columns), PANELS_IN_A_ROW)
    height = math.ceil(len(columns) / width)
    colors = DARK if dark else LIGHT
    columns_of_legend = legend_columns(list(frames), width * PANEL_WIDTH)
    legend_height = 0.2 + 0.22 * math.ceil(len(frames) / columns_of_legend)
    with sns.axes_style("ticks"), mpl.rc_context(style(colors)):
        # Made by pyplot, so that a notebook knows how to show it; closed, so that it is not shown a second time.
        figure = plt.figure(figsize=(PANEL_WIDTH * width, PANEL_HEIGHT * height + legend_height), layout="constrained")
        plt.close(figure)
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.1)
        axes = figure.subplots(height, width, squeeze=False).flatten()
        for panel, column in zip(axes, columns, strict=False):
            _draw(panel, column, frames)
        for unused in axes[len(columns) :]:
            unused.remove()
        figure.legend(
            [mpl.lines.Line2D([], [], **_line(index, len(frames))) for index in range(len(frames))],
            list(frames),
            loc="outside upper center",
            ncols=columns_of_legend,
            frameon=False,
            handlelength=3.2,
        )
    return figure


def style(colors: Mapping[str, str]) -> dict[str, object]:
    """Settings of matplotlib for a page of these colours (:data:`LIGHT` or :data:`DARK`)."""
    parts = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    text = dict.fromkeys(parts, colors["text"])
    fills = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), colors["background"])
    sizes = {"font.size": 10, "axes.labelsize": 10, "axes.titlesize": 11, "xtick.labelsize": 9, "ytick.labelsize": 9}
    frame = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": colors["grid"]}
    return {**text, **fills, **sizes, **frame}


def measured_points(metrics: pd.DataFrame, column: str) -> pd.DataFrame:
    """Columns ``step`` and ``column`` at the steps with a finite value, in order; empty where there is none."""
    if column not in metrics:
        return pd.DataFrame({"step": [], column: []})
    points = metrics[["step", column]]
    return points[np.isfinite(points[column].astype(float))].sort_values("step")


def _draw(axes: Axes, column: str, frames: Mapping[str, pd.DataFrame]) -> None:
    found = {name: measured_points(frame, column) for name, frame in frames.items()}
    for index, points in enumerate(found.values()):
        every = max(1, len(points) // MARKERS_PER_LINE)
        first_marker = index * every // len(found)
        axes.plot(points["step"], points[column], **_line(index, len(found)), markevery=(first_marker, every))
    axes.set_title(_words(column), loc="left")
    axes.set_xlabel("step (batches learned from)")
    axes.set_ylabel(METRICS[column].unit or "no unit")
    first, last = (pd.concat([frame["step"] for frame in frames.values()]).agg(end) for end in ("min", "max"))
    margin = 0.04 * (last - first) or 1  # a single step has no width of its own
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    if all(points.empty for points in found.values()):
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
    elif column.startswith("gradient_norm"):
        _logarithmic(axes, pd.concat([points[column] for points in found.values()]))
    elif METRICS[column].unit == "0 to 1":
        largest = max(points[column].max() for points in found.values() if len(points))
        top = 1.0 if column in FULL_RANGE else largest or 1.0
        axes.set_ylim(-0.03 * top, 1.05 * top)  # room for the markers at both ends


def _line(index: int, count: int) -> dict[str, object]:
    """Look of the line number ``index`` of ``count``. Earlier ones are wider, so they show under later ones."""
    palette = sns.color_palette("colorblind")
    widening = (count - 1 - index) / max(1, count - 1)
    return {
        "color": palette[index % len(palette)],
        "linestyle": LINE_STYLES[index % len(LINE_STYLES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 4.5 + 2.5 * widening,
        "linewidth": 1.5 + 1.5 * widening,
    }


def _words(column: str) -> str:
    words = column.replace("_", " ").replace("kl", "KL")
    return words[0].upper() + words[1:]


def _logarithmic(axes: Axes, values: pd.Series) -> None:
    """Logarithmic axis on which exact zeros stay visible: without any reward GRPO's gradient is zero."""
    positive = values[values > 0]
    if positive.empty:
        return
    if (values <= 0).any():
        threshold = 10.0 ** math.floor(math.log10(positive.min()))
        axes.set_yscale("symlog", linthresh=threshold, linscale=0.5)
        locator = SymmetricalLogLocator(base=10, linthresh=threshold)
        locator.set_params(numticks=6)
        axes.yaxis.set_major_locator(locator)
        axes.set_ylim(bottom=-0.1 * threshold)
    else:
        axes.set_yscale("log")
        lowest, highest = math.log10(positive.min()), math.log10(positive.max() * 1.01)
        axes.set_ylim(10.0 ** math.floor(lowest), 10.0 ** math.ceil(highest))
        axes.yaxis.set_major_locator(LogLocator(base=10, numticks=6))
    axes.yaxis.set_minor_formatter(NullFormatter())


def legend_columns(names: Sequence[str], width: float) -> int:
    """Number of legend columns for which the longest label leaves room in a figure ``width`` inches wide."""
    letters = max(len(name) for name in names) + 8  # the line sample takes the room of eight letters
    return max(1, min(len(names), int(width * 12 / letters)))  # about 12 letters to an inch
