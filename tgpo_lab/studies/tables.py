"""Tables of a study, from its stored results alone."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd

from .statistics import Interval, mean_interval, paired_comparison

NEVER = "never"
SHARE = (0.0, 1.0)


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per pair and label, as texts: means over seeds with 95 % intervals, medians, shares."""
    rows = []
    for (pair, label), group in runs.groupby(["pair", "label"], sort=False):
        rows.append(
            {
                "pair": pair,
                "method": label,
                "seeds": str(len(group)),
                "test accuracy": interval_text(mean_interval(group["test_accuracy"], SHARE), percent=True),
                "area": interval_text(mean_interval(group["area"], SHARE), percent=True),
                "steps to 50 %": steps_text(group["steps_to_50"]),
                "steps to 80 %": steps_text(group["steps_to_80"]),
                "steps to 95 %": steps_text(group["steps_to_95"]),
                "collapsed": f"{int(group['collapsed'].sum())} of {len(group)}",
                "largest gradient norm": f"{group['largest_gradient_norm'].median():.2g}",
                "entropy at the end": f"{group['last_entropy'].median():.2f}",
                "length at the end": f"{group['last_length'].median():.0f}",
            }
        )
    return pd.DataFrame(rows)


def comparison(runs: pd.DataFrame, reference: str, column: str = "area") -> pd.DataFrame:
    """:func:`paired_comparison` as texts."""
    table = paired_comparison(runs, column, reference)
    return pd.DataFrame(
        {
            "pair": table["pair"],
            f"{reference} against": table["label"],
            f"difference in {column.replace('_', ' ')}": [difference_text(row) for row in table.itertuples()],
            "seeds won": [f"{row.wins} of {row.seeds}" for row in table.itertuples()],
            "effect (d_z)": [
                f"{row.effect:.1f}" if np.isfinite(row.effect) else "no spread" for row in table.itertuples()
            ],
            "p": [p_text(p) for p in table["p"]],
            "adjusted p": [p_text(p) for p in table["adjusted_p"]],
        }
    )


def difference_text(row) -> str:
    """Difference and interval of a row of :func:`paired_comparison`, for example ``+61.2 % (55.0 to 67.3)``."""
    return interval_text(Interval(row.difference, row.low, row.high, row.seeds), percent=True, sign=True)


def interval_text(interval: Interval, *, percent: bool = False, sign: bool = False) -> str:
    """Mean and interval, for example ``97.1 % (95.0 to 98.8)``."""
    scale, unit = (100, " %") if percent else (1, "")
    plus = "+" if sign else ""
    mean, low, high = (f"{value * scale:{plus}.1f}" for value in (interval.mean, interval.low, interval.high))
    return f"{mean}{unit}" + (f" ({low} to {high})" if interval.count > 1 else "")  # one seed has no interval


def steps_text(steps: pd.Series) -> str:
    """Median over seeds, where a level that was never reached counts as later than any step; ``15 (2 of 10 never)``."""
    missing = int(steps.isna().sum())
    median = steps.astype(float).fillna(np.inf).median()
    text = f"{median:.0f}" if np.isfinite(median) else NEVER
    return f"{text} ({missing} of {len(steps)} never)" if 0 < missing < len(steps) else text


def p_text(p: float) -> str:
    """A p-value with two digits; small ones as a bound."""
    return f"{p:.2g}" if p >= 1e-4 else "< 0.0001"


def markdown(table: pd.DataFrame) -> str:
    """A table of texts as Markdown."""
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in table.itertuples(index=False)]
    return "\n".join(lines) + "\n"


def with_rate(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs with their learning rate in the column ``rate``."""
    return runs.assign(rate=[json.loads(config)["learning_rate"] for config in runs["config"]])


def each_rate(rates: pd.Series) -> str:
    """Every learning rate once, as text."""
    return "/".join(f"{rate:g}" for rate in sorted(set(rates)))
