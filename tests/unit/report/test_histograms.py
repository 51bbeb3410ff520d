from __future__ import annotations

import numpy as np
import pytest

from nemo_spin.report.histograms import histogram, histograms
from nemo_spin.report.pair_values import PairValues


def test_series_share_their_bins_and_lose_nothing() -> None:
    chance = np.random.default_rng(0)
    made = histogram({"a": chance.normal(0, 1, 1000), "b": chance.normal(3, 1, 500)})
    assert made is not None
    assert [sum(series["counts"]) for series in made["series"]] == [1000, 500]
    assert len(made["edges"]) == len(made["series"][0]["counts"]) + 1


def test_whole_numbers_get_whole_bins_from_zero() -> None:
    made = histogram({"lengths": np.array([1, 1, 2, 5])}, whole=True)
    assert made is not None
    assert made["edges"] == [0, 1, 2, 3, 4, 5, 6]
    assert made["series"][0] == {
        "label": "lengths",
        "counts": [0, 2, 1, 0, 0, 1],
        "number": 4,
        "mean": 2.25,
        "median": 1.5,
    }


def test_outliers_stay_in_the_outermost_bins() -> None:
    values = np.concatenate([np.zeros(500), np.ones(500), [1e6]])
    made = histogram({"margins": values})
    assert made is not None
    assert made["edges"][-1] < 2
    assert made["series"][0]["counts"][-1] == 501


def test_equal_values_and_values_that_are_no_numbers() -> None:
    made = histogram({"margins": np.array([2.0, 2.0, np.nan, np.inf])})
    assert made is not None
    assert (made["edges"][0], made["edges"][-1]) == (1.5, 2.5)
    assert made["series"][0]["number"] == 2


@pytest.mark.parametrize("values", [{}, {"a": np.array([])}, {"a": np.array([np.nan])}])
def test_nothing_to_count(values: dict[str, np.ndarray]) -> None:
    assert histogram(values) is None


def test_a_run_without_pairs_has_no_histograms() -> None:
    assert histograms([]) == []
    assert histograms([("iteration 0", PairValues())]) == []
