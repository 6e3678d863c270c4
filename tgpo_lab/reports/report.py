"""One HTML file that shows runs side by side: numbers, figures, sample rollouts, and how they were made.

The file stands alone: styles and figures are inside it and it asks no host for anything. It describes
what was measured and says what to look for; it claims nothing, because results differ from run to run.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..errors import InputError
from ..explorer.token_colors import cell_colors
from ..files import require_writable_folder, write_text
from ..metrics import METRICS
from ..plots import DEFAULT_COLUMNS, measured_points, plot_runs
from ..provenance import provenance
from ..runs import CONFIG_FILE, RunResult
from .comparison import UNITS, caption, summary_table, table_texts
from .sample_rollouts import AnnotatedRollout

TEMPLATE = Path(__file__).with_name("report_template.html")
FIGURE_DOTS_PER_INCH = 160  # sharp on screens with two dots for each pixel
# Nats at which the colour of a token is full: the default threshold above which a token counts as rejected.
FULL_COLOR = 4.0
LEGEND_VALUES = (-4, -3, -2, -1, 0, 1, 2, 3, 4)


@dataclass(frozen=True)
class FigureEntry:
    """One figure of the report."""

    column: str
    definition: str
    look_for: str
    light: str
    """The picture as a data URI."""
    dark: str
    description: str
    """Text in place of the picture: where each line starts and ends."""


@dataclass(frozen=True)
class ComparedRow:
    """One row of a table with a column for each run."""

    name: str
    values: list[str]

    @property
    def same(self) -> bool:
        """Whether all runs have one value."""
        return len(set(self.values)) == 1


def write_report(
    path: str | Path,
    title: str,
    runs: Mapping[str, RunResult],
    rollouts: Mapping[str, Mapping[str, Sequence[AnnotatedRollout]]] | None = None,
    *,
    before: Mapping[str, float] | None = None,
    after: Mapping[str, float] | None = None,
) -> Path:
    """Write the report of some runs, whole or not at all.

    Args:
        path: of the HTML file.
        title: heading of the report.
        runs: label → run.
        rollouts: label → {"before": rollouts, "after": rollouts to the same prompts in the same order}.
        before: label → accuracy on the test prompts before training.
        after: the same after training. Without the two, the runs' own held-out accuracies are shown.

    Returns:
        The path.

    Raises:
        InputError: no runs, rollouts of another label or in unequal numbers, a folder that cannot be
            written; what :func:`tgpo_lab.reports.comparison.summary_table` raises.
    """
    path = Path(path)
    table, samples = summary_table(runs, before, after), _samples(runs, rollouts or {})
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,  # titles, prompts and tokens are data, whatever they look like
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    text = environment.get_template(TEMPLATE.name).render(
        title=title,
        names=list(runs),
        stopped=[(name, _last_step(run.metrics), run.config.steps) for name, run in runs.items() if not run.completed],
        table=table_texts(table),
        units=UNITS,
        table_caption=caption(table),
        figures=_figures({name: run.metrics for name, run in runs.items()}),
        samples=samples,
        token_style=token_style,
        legend_values=LEGEND_VALUES,
        full_color=FULL_COLOR,
        configuration=_compared([_flat(run.config.as_dict()) for run in runs.values()]),
        made=_compared([_made(run) for run in runs.values()]),
        written=provenance(),
    )
    require_writable_folder(path.parent)
    write_text(path, text)
    return path


def token_style(difference: float) -> str:
    """CSS of a token by its d_t: purple (below 0) over white to orange (above 0), with readable text."""
    background, text = cell_colors(difference / FULL_COLOR)
    return f"background:{background};color:{text}"


def _figures(frames: Mapping[str, pd.DataFrame]) -> list[FigureEntry]:
    """One figure for each default column that some run has measured, each with its own legend."""
    entries = []
    for column in DEFAULT_COLUMNS:
        measured = {name: measured_points(frame, column) for name, frame in frames.items()}
        measured = {name: points for name, points in measured.items() if not points.empty}
        if not measured:
            continue
        spans = []
        for name, points in measured.items():
            first, last = points.iloc[0], points.iloc[-1]
            spans.append(
                f"{name} from {first[column]:.3g} at step {first['step']:.0f} to {last[column]:.3g} "
                f"at step {last['step']:.0f}"
            )
        metric = METRICS[column]
        entries.append(
            FigureEntry(
                column,
                metric.definition,
                metric.healthy,
                _picture(frames, column, dark=False),
                _picture(frames, column, dark=True),
                f"Line chart of {column} over steps: " + "; ".join(spans) + ".",
            )
        )
    return entries


def _picture(frames: Mapping[str, pd.DataFrame], column: str, *, dark: bool) -> str:
    target = io.BytesIO()
    plot_runs(frames, [column], dark=dark).savefig(target, format="png", dpi=FIGURE_DOTS_PER_INCH)
    return "data:image/png;base64," + base64.b64encode(target.getvalue()).decode("ascii")


def _samples(
    runs: Mapping[str, RunResult], rollouts: Mapping[str, Mapping[str, Sequence[AnnotatedRollout]]]
) -> dict[str, list[list[tuple[str, AnnotatedRollout]]]]:
    """For each label and prompt the rollouts before and after, each with its heading."""
    samples = {}
    for name, stages in rollouts.items():
        if name not in runs or set(stages) != {"before", "after"} or len(stages["before"]) != len(stages["after"]):
            raise InputError(
                f"The rollouts of {name!r} do not fit: expected a label of the runs ({', '.join(runs)}) with as many "
                f"rollouts under 'before' as under 'after', but found "
                f"{ {stage: len(found) for stage, found in stages.items()} }."
            )
        samples[name] = [
            [("Before training", first), ("After training", second)]
            for first, second in zip(stages["before"], stages["after"], strict=True)
        ]
    return samples


def _made(run: RunResult) -> dict[str, str]:
    """Command, versions and times of a run, as far as its folder tells."""
    file = run.directory / CONFIG_FILE
    stored = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    stored.pop("config", None)
    seconds = run.metrics[[column for column in METRICS if column.startswith("seconds_")]].sum().sum()
    return {
        "folder": str(run.directory),
        "seed": str(run.config.seed),
        "last step": f"{_last_step(run.metrics)} of {run.config.steps}",
        "time in the training loop": f"{seconds:.0f} s",
        **_flat(stored),
    }


def _last_step(metrics: pd.DataFrame) -> int:
    return 0 if metrics.empty else int(metrics["step"].max())


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Nested values as texts under dotted names."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, list):  # the changes of a resumed run
            value = {str(number): item for number, item in enumerate(value, start=1)}
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = "–" if value is None else str(value)
    return flat


def _compared(columns: Sequence[Mapping[str, str]]) -> list[ComparedRow]:
    names = dict.fromkeys(name for column in columns for name in column)
    return [ComparedRow(name, [column.get(name, "–") for column in columns]) for name in names]


def _number(value: float) -> str:
    """Two decimals with a true minus sign."""
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.2f}"
    return "0.00" if text == "-0.00" else text.replace("-", "−")
