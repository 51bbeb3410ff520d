"""Seeded choices of prompts."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from nemo_spin.data.mixture import chosen, chosen_ids, num_chosen


@pytest.mark.parametrize(
    ("amount", "total", "number"),
    [(1, 7, 7), (0.5, 7, 4), (0.0, 7, 0), (0.01, 1000, 10), (5, 7, 5), (9, 7, 7), (2.0, 7, 2)],
)
def test_a_share_up_to_one_a_count_above(amount: float, total: int, number: int) -> None:
    assert num_chosen(amount, total) == number


def test_more_with_the_same_seed_is_the_same_and_more() -> None:
    few, many = chosen(100, 10, seed=[1, 2]), chosen(100, 40, seed=[1, 2])
    assert set(few) < set(many) and list(many) == sorted(set(many)) and len(many) == 40
    assert not np.array_equal(few, chosen(100, 10, seed=[1, 3]))


def test_ids_count_once_and_in_any_order() -> None:
    ids = ["d", "a", "a", "c", "b", "b"]
    one, other = (pa.chunked_array([order]) for order in (ids, ids[::-1]))
    assert chosen_ids(one, 2, seed=[7]).equals(chosen_ids(other, 2, seed=[7]))
    assert sorted(chosen_ids(one, 1, seed=[7]).to_pylist()) == ["a", "b", "c", "d"]
    assert len(chosen_ids(one, 0.5, seed=[7])) == 2
