"""Exercises of notebook 10."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from scipy import stats

from ..studies.statistics import sign_flip_p
from .checking import Exercise, Told


def _differences() -> list[tuple[np.ndarray]]:
    return [
        (np.array(values),)
        for values in (
            [0.1, 0.2, 0.3, 0.4],
            [1.0, -2.0, 3.0, 1.0, 2.0],
            [-1.0, -1.0, -3.0],
            [0.1, 0.2, 0.3, -0.3],  # two patterns give the same mean but for rounding
            [1.0, -1.0, -2.0],
            [1.0, -1.0],  # the mean is zero, and every pattern is as far from it
        )
    ]


def _patterns(differences: np.ndarray) -> np.ndarray:
    signs = np.array(list(itertools.product([1, -1], repeat=len(differences))))
    return (signs * differences).mean(-1)


def _one_sided(differences: np.ndarray) -> float:
    return float((_patterns(differences) >= differences.mean() - 1e-12).mean())


def _strictly(differences: np.ndarray) -> float:
    return float((np.abs(_patterns(differences)) > abs(differences.mean()) + 1e-12).mean())


def _no_margin(differences: np.ndarray) -> float:
    return float((np.abs(_patterns(differences)) >= abs(differences.mean())).mean())


def _mean_without_size(differences: np.ndarray) -> float:
    return float((np.abs(_patterns(differences)) >= differences.mean() - 1e-12).mean())


def _one_side_doubled(differences: np.ndarray) -> float:
    return float(2 * (_patterns(differences) >= abs(differences.mean()) - 1e-12).mean())


def _share(function, differences: np.ndarray) -> object:
    """A p-value. One that changes from call to call, or is no multiple of 2^−n, was drawn at random."""
    result = function(differences)
    if isinstance(result, np.ndarray) and result.ndim:
        raise Told(f"Your function returned an array of shape {result.shape}: the p-value is one number, a share.")
    if isinstance(result, float) and 0 < result < 1:
        patterns = result * 2 ** len(differences)
        if abs(patterns - round(patterns)) > 1e-6 and function(differences) != result:
            raise Told("You drew sign patterns at random; there are few enough to go through all of them.")
    return result


def _p_values() -> list[tuple[np.ndarray]]:
    return [(np.array(values),) for values in ([0.04, 0.001, 0.03, 0.2], [0.5, 0.9, 0.02, 0.021, 0.6, 0.01])]


def _adjusted(p_values: np.ndarray, *, monotone: bool = True, ordered: bool = True) -> np.ndarray:
    count = len(p_values)
    order = np.argsort(p_values)
    scaled = p_values[order] * count / np.arange(1, count + 1)
    if monotone:
        scaled = np.minimum.accumulate(scaled[::-1])[::-1]
    result = scaled.copy()
    if ordered:
        result[order] = scaled
    return np.minimum(result, 1)


def _maximum_from_the_start(p_values: np.ndarray) -> np.ndarray:
    order = np.argsort(p_values)
    scaled = p_values[order] * len(p_values) / np.arange(1, len(p_values) + 1)
    result = np.empty(len(p_values))
    result[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return result


def _wrongly_put_back(p_values: np.ndarray) -> np.ndarray:
    return _adjusted(p_values, ordered=False)[np.argsort(p_values)]


def _scaled_by(factors: Callable[[int], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """Adjusted p-values with the sorted ones multiplied by ``factors(m)``, (m,)."""

    def adjusted(p_values: np.ndarray) -> np.ndarray:
        order = np.argsort(p_values)
        with np.errstate(divide="ignore"):
            scaled = p_values[order] * factors(len(p_values))
        result = np.empty(len(p_values))
        result[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1)
        return result

    return adjusted


def _as_list(function, *arguments):
    result = function(*arguments)
    return result.tolist() if isinstance(result, np.ndarray) else result


EXERCISES = (
    Exercise(
        "10.1",
        "the sign-flip test",
        sign_flip_p,
        _differences,
        {
            "This is one-sided: count means as far from zero in either direction.": _one_sided,
            "The observed mean needs its absolute value, too.": _mean_without_size,
            "This is one side, doubled. That is above 1 for a mean of zero: count absolute values instead.": (
                _one_side_doubled
            ),
            "The observed pattern is missing: means that are equally far from zero count, too.": _strictly,
            "This is a number of patterns; the p-value is their share.": (
                lambda differences: sign_flip_p(differences) * 2 ** len(differences)
            ),
            "Rounding made means that are equally far from zero a tiny bit smaller: compare with a margin of 1e-12.": (
                _no_margin
            ),
            "This is Student's t-test, which takes the differences for normally distributed. Flip the signs instead.": (
                lambda differences: float(stats.ttest_1samp(differences, 0).pvalue)
            ),
        },
        observe=_share,
    ),
    Exercise(
        "10.2",
        "Benjamini and Hochberg",
        stats.false_discovery_control,
        _p_values,
        {
            "An adjusted p-value is larger than the next one: take the running minimum from the end.": (
                lambda p_values: _adjusted(p_values, monotone=False)
            ),
            "The values are right and in the order of size: put them back in the order in which they came.": (
                lambda p_values: _adjusted(p_values, ordered=False)
            ),
            "The values are right and at the wrong places: put them back with result[order] = …, not with …[order].": (
                _wrongly_put_back
            ),
            "k counts from 1: the smallest p-value is multiplied by m/1.": _scaled_by(
                lambda count: count / np.arange(count)
            ),
            "Multiply by m/k, not by k/m.": _scaled_by(lambda count: np.arange(1, count + 1) / count),
            "This is a running maximum from the smallest one on: take the running minimum from the largest one back.": (
                _maximum_from_the_start
            ),
            "This is Bonferroni's correction, m times each p-value; here the k-th smallest is multiplied by m/k.": (
                lambda p_values: np.minimum(p_values * len(p_values), 1)
            ),
        },
        observe=_as_list,
    ),
)
