"""Accuracy at equal numbers of teacher tokens: learned from, or written by the teacher."""

from __future__ import annotations

import numpy as np
import pandas as pd


def with_teacher_tokens(steps: pd.DataFrame) -> pd.DataFrame:
    """Rows of steps with what was used before each: ``teacher_tokens`` learned from and ``written`` by the teacher.

    Accuracy at a step is measured before that step's tokens. What a teacher writes need not be learned from: the
    ablation tgpo-unconditioned takes no more of it than the student has written, and none once its weight is zero.
    """
    steps = steps.sort_values(["cell", "step"], ignore_index=True)
    at_prefixes = steps["guided"].fillna(0.0) * steps["tokens"]
    written = steps["teacher_trace_tokens"].fillna(0.0)
    as_many = written.clip(upper=steps["tokens"]).where(steps["weight"] > 0, 0.0)
    used = at_prefixes.where(steps["label"] == "tgpo", written).where(steps["label"] != "tgpo-unconditioned", as_many)
    cells = steps["cell"]
    return steps.assign(
        teacher_tokens=used.groupby(cells).cumsum() - used, written=written.groupby(cells).cumsum() - written
    )


def at_equal_tokens(steps: pd.DataFrame) -> pd.DataFrame:
    """Each run at the largest number of teacher tokens that all runs of its pair have learned from.

    Args:
        steps: as :func:`with_teacher_tokens` returns them.

    Returns:
        One row a run: ``cell``, ``pair``, ``label``, ``seed``, that number (``budget``), the ``accuracy`` there, how
        many the teacher had ``written`` by then, and the accuracy when it had written as many as the budget
        (``by_written``; NaN where it never had). Between measurements in a straight line.
    """
    measured = steps.dropna(subset=["accuracy"])
    rows = []
    for pair, of_pair in measured.groupby("pair", sort=False):
        budget = of_pair.groupby("cell")["teacher_tokens"].max().min()
        for (label, seed, cell), run in of_pair.groupby(["label", "seed", "cell"]):
            accuracy, written = (
                np.interp(budget, run["teacher_tokens"], run[column]) for column in ("accuracy", "written")
            )
            reached = run["written"].max() >= budget
            by_written = np.interp(budget, run["written"], run["accuracy"]) if reached else np.nan
            rows.append({"cell": cell, "pair": pair, "label": label, "seed": seed, "budget": budget,
                         "accuracy": accuracy, "written": written, "by_written": by_written})  # fmt: skip
    return pd.DataFrame(rows)
