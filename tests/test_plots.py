"""Figures: what stands on the axes, that lines can be told apart, and that nothing is lost or cut."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from tgpo_lab.config import TrainConfig
from tgpo_lab.errors import InputError
from tgpo_lab.metrics import METRICS, metrics_frame
from tgpo_lab.plots import DEFAULT_COLUMNS, measured_points, plot_runs
from tgpo_lab.runs import RunResult


def frame(steps: int = 21, **columns) -> pd.DataFrame:
    """Metrics of a run with accuracy at every fifth step and everything else at every step but the last."""
    step = np.arange(steps)
    rows = pd.DataFrame({"step": step, **dict.fromkeys(METRICS, np.nan)})
    for column in DEFAULT_COLUMNS:
        rows[column] = np.where(step < steps - 1, 0.5 + step / steps, np.nan)
    rows["accuracy"] = np.where(step % 5 == 0, step / steps, np.nan)
    return rows.assign(**columns)


def axes_of(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_every_panel_has_a_title_and_both_labels_and_the_unit_of_the_metric():
    figure = plot_runs({"a": frame()}, list(METRICS))
    assert len(figure.axes) == len(METRICS)
    for axes, metric in zip(figure.axes, METRICS.values(), strict=True):
        assert axes.get_title(loc="left")
        assert axes.get_xlabel() == "step (batches learned from)"
        assert axes.get_ylabel() == (metric.unit or "no unit")


def test_the_default_columns_are_drawn_but_not_those_that_no_run_has_measured():
    titles = [
        "Accuracy", "Reward", "Length", "Entropy", "Reverse KL", "Agreement", "Rejected", "Gradient norm", "Weight",
    ]  # fmt: skip
    assert list(axes_of(plot_runs({"a": frame()}))) == titles
    without = plot_runs({"a": frame(weight=np.nan), "b": frame().drop(columns="weight")})
    assert list(axes_of(without)) == titles[:-1]
    assert "Weight" in axes_of(plot_runs({"a": frame(weight=np.nan), "b": frame()}))


def test_lines_carry_the_measured_values_without_gaps():
    axes = axes_of(plot_runs({"a": frame(), "b": frame(11)}))["Accuracy"]
    first, second = axes.lines
    assert first.get_xdata().tolist() == [0, 5, 10, 15, 20]
    assert first.get_ydata() == pytest.approx(np.array([0, 5, 10, 15, 20]) / 21)
    assert second.get_xdata().tolist() == [0, 5, 10]


def test_a_run_and_its_metrics_give_the_same_figure():
    run = RunResult(Path("nowhere"), TrainConfig(), frame(), student=None, completed=True)
    for ours, theirs in zip(plot_runs({"a": run}).axes, plot_runs({"a": frame()}).axes, strict=True):
        np.testing.assert_array_equal(ours.lines[0].get_xydata(), theirs.lines[0].get_xydata())


def test_seven_runs_differ_in_colour_and_without_colour_and_stand_in_one_legend():
    runs = {f"run {i}": frame() for i in range(7)}
    figure = plot_runs(runs, ["reward", "length"])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(runs)
    assert all(axes.get_legend() is None for axes in figure.axes)
    handles = legend.get_lines()
    for lines in (figure.axes[0].lines, figure.axes[1].lines, handles):
        assert len({line.get_color() for line in lines}) == 7
        assert len({line.get_marker() for line in lines}) == 7
        assert len({line.get_linestyle() for line in lines[:4]}) == 4
    for line, handle in zip(figure.axes[0].lines, handles, strict=True):
        assert (line.get_color(), line.get_linestyle(), line.get_marker()) == (
            handle.get_color(), handle.get_linestyle(), handle.get_marker(),
        )  # fmt: skip


def test_an_earlier_line_shows_under_a_later_one_with_the_same_values():
    first, second, third = plot_runs({"a": frame(), "b": frame(), "c": frame()}, ["reward"]).axes[0].lines
    assert first.get_linewidth() > second.get_linewidth() > third.get_linewidth()
    assert first.get_zorder() <= second.get_zorder() <= third.get_zorder()


def test_gradient_norms_are_on_a_logarithmic_axis_on_which_zeros_stay_visible():
    positive = plot_runs({"a": frame(gradient_norm=np.geomspace(0.01, 100, 21))}, ["gradient_norm"]).axes[0]
    assert positive.get_yscale() == "log"
    norms = np.geomspace(0.01, 100, 21)
    norms[3] = 0.0
    with_zero = plot_runs({"a": frame(gradient_norm=norms)}, ["gradient_norm"]).axes[0]
    assert with_zero.get_yscale() == "symlog"
    bottom, top = with_zero.get_ylim()
    assert bottom < 0 < 0.01 < 100 <= top
    assert plot_runs({"a": frame(gradient_norm=0.0)}, ["gradient_norm"]).axes[0].get_yscale() == "linear"


def test_accuracy_has_its_full_range_and_a_small_share_does_not():
    axes = axes_of(plot_runs({"a": frame(accuracy=0.02, rejected=0.02)}))
    assert axes["Accuracy"].get_ylim()[0] < 0 < 1 < axes["Accuracy"].get_ylim()[1]
    assert axes["Rejected"].get_ylim()[0] < 0 < 0.02 < axes["Rejected"].get_ylim()[1] < 0.1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_left_out(value):
    rows = frame(gradient_norm=[0.5, value, 2.0, *[1.0] * 18])
    assert measured_points(rows, "gradient_norm")["step"].tolist() == [0, *range(2, 21)]
    plot_runs({"a": rows}).savefig(Path("/dev/null"), format="png")


@pytest.mark.parametrize("steps", [1, 2, 120])
@pytest.mark.parametrize("runs", [1, 3])
def test_texts_lie_inside_the_figure_and_panels_do_not_overlap(steps, runs):
    frames = {f"a run with a long name {i}": frame(steps) for i in range(runs)}
    figure = plot_runs(frames, DEFAULT_COLUMNS[:5])
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.axes] + [figure.legends[0].get_window_extent()]
    for number, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:number])


def test_a_column_asked_for_that_nobody_measured_says_so():
    (axes,) = plot_runs({"a": frame()}, ["loss_teacher"]).axes
    assert [text.get_text() for text in axes.texts] == ["not measured"]


def test_a_dark_figure_has_light_text_on_dark_ground():
    for dark in (False, True):
        figure = plot_runs({"a": frame()}, ["reward"], dark=dark)
        figure.draw_without_rendering()
        (axes,) = figure.axes
        texts = [axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels(),
                 *figure.legends[0].get_texts()]  # fmt: skip
        for text in texts:
            ground, ink = np.mean(figure.get_facecolor()[:3]), np.mean(plt.matplotlib.colors.to_rgb(text.get_color()))
            assert (ink - ground > 0.6) if dark else (ground - ink > 0.6)


def test_no_figure_stays_open_in_pyplot():
    before = plt.get_fignums()
    plot_runs({"a": frame()})
    assert plt.get_fignums() == before


@pytest.mark.parametrize(
    ("runs", "columns", "message"),
    [
        ({}, None, "at least one run"),
        ({"a": frame()}, ["acuracy"], "Unknown column 'acuracy': choose from reward, accuracy"),
        ({"a": frame()}, ["step"], "Unknown column 'step'"),
        ({"a": frame()}, [], "nothing to plot"),
        ({"a": metrics_frame([])}, None, "nothing to plot"),
        ({"a": metrics_frame([])}, ["reward"], "nothing to plot"),
    ],
)
def test_nothing_to_plot_is_refused(runs, columns, message):
    with pytest.raises(InputError, match=message):
        plot_runs(runs, columns)
