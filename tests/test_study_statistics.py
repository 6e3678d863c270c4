"""Statistics over seeds, against values worked out by hand and by enumeration."""

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tgpo_lab.errors import InputError
from tgpo_lab.studies.statistics import mean_interval, paired_comparison, sign_flip_p


@given(st.lists(st.integers(-5, 5), min_size=2, max_size=8))
def test_the_sign_flip_test_equals_enumeration_of_all_signs(values):
    differences = np.array(values, dtype=float)
    observed = abs(differences.mean())
    means = [abs(np.mean(differences * signs)) for signs in itertools.product((1, -1), repeat=len(values))]
    expected = np.mean([mean >= observed - 1e-12 for mean in means])
    assert sign_flip_p(differences) == pytest.approx(expected, abs=1e-9)


def test_ten_wins_out_of_ten_have_the_smallest_possible_p():
    assert sign_flip_p(np.arange(1.0, 11.0)) == pytest.approx(2 / 2**10)
    assert sign_flip_p(np.zeros(10)) == 1.0


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_an_interval_holds_the_mean_and_covers_the_truth_about_as_often_as_it_says(seeds):
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        interval = mean_interval(random.normal(3.0, 1.0, size=seeds))
        assert interval.low <= interval.mean <= interval.high
        covered += interval.low <= 3.0 <= interval.high
    assert 925 <= covered <= 975  # a percentile bootstrap would cover about 810 with five seeds


def test_an_interval_by_hand_and_cut_at_its_bounds():
    values = np.array([0.9, 1.0, 0.95])
    error = 4.302653 * np.std(values, ddof=1) / np.sqrt(3)  # t of two degrees of freedom
    interval = mean_interval(values)
    assert (interval.low, interval.high) == pytest.approx((0.95 - error, 0.95 + error))
    assert mean_interval(values, (0.0, 1.0)).high == 1.0


def test_an_interval_without_spread_is_a_point():
    assert mean_interval(np.full(5, 0.25)) == mean_interval(np.array([0.25] * 5))
    point = mean_interval(np.full(5, 0.25))
    assert (point.mean, point.low, point.high, point.count) == (0.25, 0.25, 0.25, 5)


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [np.inf]])
def test_an_interval_of_nothing_is_refused(values):
    with pytest.raises(InputError, match="finite values"):
        mean_interval(np.array(values))


def frame(values: dict[tuple[str, str], list[float]]) -> pd.DataFrame:
    return pd.DataFrame(
        {"pair": pair, "label": label, "seed": seed, "area": value}
        for (pair, label), numbers in values.items()
        for seed, value in enumerate(numbers)
    )


def test_a_comparison_by_hand():
    runs = frame({("far", "tgpo"): [0.5, 0.7, 0.6], ("far", "rkl"): [0.1, 0.1, 0.3], ("far", "same"): [0.5, 0.7, 0.6]})
    table = paired_comparison(runs, "area", "tgpo").set_index("label")
    row = table.loc["rkl"]  # differences 0.4, 0.6, 0.3
    assert row["difference"] == pytest.approx(1.3 / 3)
    assert row["wins"] == row["seeds"] == 3
    assert row["effect"] == pytest.approx((1.3 / 3) / np.std([0.4, 0.6, 0.3], ddof=1))
    assert row["p"] == pytest.approx(2 / 8)
    assert table.loc["same", "difference"] == 0 and table.loc["same", "p"] == 1.0 and table.loc["same", "wins"] == 0
    assert list(table["adjusted_p"]) == pytest.approx(list(stats.false_discovery_control(table["p"])))


def test_seeds_are_compared_with_themselves_whatever_the_order_of_rows():
    runs = frame({("far", "tgpo"): [0.1, 0.5, 0.9], ("far", "rkl"): [0.0, 0.4, 0.8]})
    table = paired_comparison(runs.sample(frac=1, random_state=1), "area", "tgpo")
    assert table["difference"].item() == pytest.approx(0.1)
    assert table["effect"].item() > 1e6 or np.isinf(table["effect"].item())


def test_only_seeds_that_both_have_are_compared():
    runs = frame({("far", "tgpo"): [0.5, 0.7, 0.6], ("far", "rkl"): [0.1, 0.1]})
    assert paired_comparison(runs, "area", "tgpo")["seeds"].item() == 2
    assert paired_comparison(frame({("far", "tgpo"): [0.5, 0.7], ("far", "rkl"): [0.1]}), "area", "tgpo").empty


def test_a_study_under_way_is_compared_where_it_can_be():
    runs = frame({("near", "tgpo"): [0.5, 0.7], ("near", "rkl"): [0.1, 0.2], ("far", "rkl"): [0.1, 0.2],
                  ("far", "tgpo"): [0.3], ("mid", "rkl"): [0.1, 0.2]})  # fmt: skip
    assert paired_comparison(runs, "area", "tgpo")["pair"].tolist() == ["near"]


def test_an_unknown_reference_is_refused():
    with pytest.raises(InputError, match="no runs of 'sft'"):
        paired_comparison(frame({("far", "tgpo"): [0.5, 0.7]}), "area", "sft")
