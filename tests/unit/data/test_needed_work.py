"""Needed work, counted by hand and by looking at every pair of positions."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from nemo_spin.data.datasets import REAL_ONLY, Units
from nemo_spin.data.needed_work import Needed, NeededWork
from nemo_spin.data.packing import Layout

IDS = pa.list_(pa.int32())


def table(units: list[tuple[int, int, list[int]]]) -> pa.Table:
    """Rows of units, each (prompt, real, [generated, ...]) tokens."""
    rows = [
        {"id": str(number), "prompt_ids": [1] * prompt, "real_ids": [2] * real, "generated_ids": [3] * size}
        for number, (prompt, real, generated) in enumerate(units)
        for size in generated
    ]
    lists = dict.fromkeys(("prompt_ids", "real_ids", "generated_ids"), IDS)
    return pa.Table.from_pylist(rows, schema=pa.schema({"id": pa.string(), **lists}))


def test_by_hand() -> None:
    work = NeededWork(Units(table([(3, 2, [1]), (2, 1, [4, 1])])))
    # attended: 3*4/2 + (2*3/2 + 2*3) + (1 + 1*3) = 19; 2*3/2 + (1 + 2) + (10 + 4*2) + (1 + 2) = 27
    assert work.of(np.array([0])) == Needed(1, 6, 3, 3, 19)
    assert work.of(np.array([1])) == Needed(2, 8, 6, 4, 27)
    assert work.of(np.array([0, 1, 1])) == Needed(5, 22, 15, 11, 73)


def test_plain_fine_tuning_has_one_response_and_no_pairs() -> None:
    work = NeededWork(Units(table([(3, 2, [9])]), REAL_ONLY))
    assert work.of(np.array([0])) == Needed(0, 5, 2, 0, 15)


@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 6), st.lists(st.integers(1, 6), min_size=1, max_size=3)),
        min_size=1,
        max_size=4,
    )
)
def test_it_is_what_sharing_prompts_computes(lengths: list[tuple[int, int, list[int]]]) -> None:
    units = Units(table(lengths))
    indices = np.arange(units.num_units)
    microbatch = Layout("shared_prompt", 10_000, 1).collate(units, indices.tolist())
    seen = 0
    assert microbatch.segments is not None
    for first, count, _, prefix_count, run_first, _ in microbatch.segments.tolist():
        seen += sum(prefix_count + query - run_first + 1 for query in range(first, first + count))
    needed = NeededWork(units).of(indices)
    assert needed.attended == seen
    assert needed.tokens == microbatch.num_slots
    assert needed.response_tokens == len(microbatch.target_ids)
    pairs = Layout("pairs", 10_000, 1).collate(units, indices.tolist())
    assert needed.repeated_prompt_tokens == pairs.num_slots - microbatch.num_slots
