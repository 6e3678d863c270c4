"""Intervals and paired tests over seeds, by scipy. A seed gives all methods the same prompts and random numbers,
so methods are compared seed by seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from ..errors import InputError

CONFIDENCE = 0.95
LEVEL = 0.05
"""A difference is shown where the p-value of its test, corrected where there are many, is below."""
RESAMPLES = 9999


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % interval."""

    mean: float
    low: float
    high: float
    count: int
    """Number of seeds."""


def mean_interval(values: np.ndarray, bounds: tuple[float, float] = (-np.inf, np.inf)) -> Interval:
    """Mean over seeds with Student's t interval, cut at ``bounds``; without spread, or with one seed, a point.

    A bootstrap would be too narrow here: with five seeds its 95 % interval holds the truth about 81 times in 100.

    Raises:
        InputError: no values, or one that is not finite.
    """
    values = np.asarray(values, dtype=float)
    if not len(values) or not np.isfinite(values).all():
        raise InputError(f"An interval needs finite values from at least one seed, but got {values.tolist()}.")
    mean, error = float(values.mean()), stats.sem(values) if len(values) > 1 else 0.0
    if not error > 0:
        return Interval(mean, mean, mean, len(values))
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, loc=mean, scale=error)
    return Interval(mean, max(bounds[0], float(low)), min(bounds[1], float(high)), len(values))


def paired_comparison(runs: pd.DataFrame, column: str, reference: str) -> pd.DataFrame:
    """``reference`` against every other label, pair by pair, over the seeds that both have.

    A pair without two seeds of the reference is left out, and so is a label that shares fewer than two with it.

    The test is the exact sign-flip permutation test of the mean difference, two-sided: with n seeds no p-value lies
    below 2^(1−n). ``adjusted_p`` is corrected by Benjamini and Hochberg over all comparisons of the table.

    Args:
        runs: rows with ``pair``, ``label``, ``seed`` and ``column``.
        column: what is compared.
        reference: label that the others are compared with.

    Returns:
        One row per pair and other label: ``difference`` (reference − label, mean over seeds) with ``low`` and
        ``high``, ``seeds``, ``wins`` (seeds with a positive difference), ``effect`` (Cohen's d_z: mean by
        standard deviation of the differences, infinite where they do not vary), ``p`` and ``adjusted_p``.

    Raises:
        InputError: the reference has no runs.
    """
    if reference not in set(runs["label"]):
        raise InputError(f"There are no runs of {reference!r}: there are {', '.join(sorted(set(runs['label'])))}.")
    rows = []
    for pair, of_pair in runs.groupby("pair", sort=False):
        wide = of_pair.pivot(index="seed", columns="label", values=column)
        for label in wide.columns if reference in wide else []:
            both = wide[[reference, label]].dropna()
            if label == reference or len(both) < 2:
                continue
            difference = (both[reference] - both[label]).to_numpy()
            interval, spread = mean_interval(difference), difference.std(ddof=1)
            effect = interval.mean / spread if spread > 1e-12 else float(np.sign(interval.mean)) * np.inf
            rows.append(
                {
                    "pair": pair,
                    "label": label,
                    "difference": interval.mean,
                    "low": interval.low,
                    "high": interval.high,
                    "seeds": len(both),
                    "wins": int((difference > 0).sum()),
                    "effect": 0.0 if interval.mean == 0 else effect,
                    "p": sign_flip_p(difference),
                }
            )
    columns = ["pair", "label", "difference", "low", "high", "seeds", "wins", "effect", "p"]
    table = pd.DataFrame(rows, columns=columns)
    table["adjusted_p"] = stats.false_discovery_control(table["p"]) if len(table) else []
    return table


def sign_flip_p(differences: np.ndarray) -> float:
    """Exact two-sided p-value that paired differences have mean zero: all 2^n sign patterns are tried."""
    if not np.any(differences):
        return 1.0
    result = stats.permutation_test(
        (differences,),
        lambda sample, axis: np.mean(sample, axis=axis),
        permutation_type="samples",
        n_resamples=np.inf if len(differences) <= 14 else RESAMPLES,
        alternative="two-sided",
        vectorized=True,
        rng=0,
    )
    return float(result.pvalue)
