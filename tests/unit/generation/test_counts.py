from __future__ import annotations

import pyarrow as pa
import pytest

from nemo_spin.data.columns import GENERATED
from nemo_spin.generation.counts import count_answers


def _table(*rows: tuple[str, int, list[int], list[int], str]) -> pa.Table:
    names = ("id", "sample", "real_ids", "generated_ids", "finish_reason")
    plain = [
        {**dict(zip(names, row, strict=True)), "iteration": 0, "prompt_ids": [1], "sampler_logps": -1.0}
        | {"num_sampler_tokens": len(row[3]), "opponent_sha256": "a"}
        for row in rows
    ]
    return pa.Table.from_pylist(plain, schema=GENERATED)


def test_counts_by_hand() -> None:
    first = _table(
        ("a", 0, [5, 6, 3], [5, 6, 3], "stop"),  # equal to real
        ("a", 1, [5, 6, 3], [5, 6, 3], "stop"),  # equal, and a duplicate
        ("b", 0, [7, 3], [3], "stop"),  # empty
        ("b", 1, [7, 3], [9, 9, 9, 9], "length"),  # cut
    )
    second = _table(("c", 0, [8, 8, 8, 8, 3], [5, 6, 3], "stop"), ("c", 1, [8, 8, 8, 8, 3], [1, 3], "stop"))
    counts = count_answers([first, second])
    assert counts == {
        "rows": 6,
        "prompts": 3,
        "tokens": 3 + 3 + 1 + 4 + 3 + 2,
        "mean_length": pytest.approx(16 / 6),
        "median_length": 3,  # 1 2 3 3 3 4
        "real_mean_length": pytest.approx(10 / 3),
        "real_median_length": 3,  # 2 3 5
        "cut_share": pytest.approx(1 / 6),
        "eos_share": pytest.approx(5 / 6),
        "empty_share": pytest.approx(1 / 6),
        "equal_share": pytest.approx(2 / 6),
        "duplicate_share": pytest.approx(1 / 6),
        "repetitive_share": 0,
        "distinct_share": pytest.approx(4 / 6),
    }


@pytest.mark.parametrize(
    ("ids", "repetitive"),
    [
        ([7] * 16, True),
        ([7] * 15, False),  # too short to tell
        (list(range(40)), False),
        ([1, 2, 3] * 8, True),
        ([*range(20), *[5] * 20], False),  # 20 of 37 runs differ
        ([*range(12), *[5] * 28], True),
    ],
)
def test_an_answer_that_repeats_itself(ids: list[int], repetitive: bool) -> None:
    counts = count_answers([_table(("a", 0, [3], ids, "length"))])
    assert counts["repetitive_share"] == float(repetitive)


def test_the_median_of_an_even_number_lies_between() -> None:
    counts = count_answers([_table(("a", 0, [3], [3], "stop"), ("b", 0, [3], [5, 5, 5, 3], "stop"))])
    assert counts["median_length"] == 2.5


def test_nothing_counts_as_nothing() -> None:
    counts = count_answers([])
    assert set(counts.values()) == {0}


def test_a_slice_counts_its_own_rows() -> None:
    table = _table(*((str(n), 0, [n, 3], [n] * (n + 1) + [3], "stop") for n in range(6)))
    assert count_answers([table.slice(2, 3)]) == count_answers([table.take([2, 3, 4])])
    assert count_answers([pa.concat_tables([table.slice(0, 1), table.slice(4)])])["tokens"] == 2 + 6 + 7


def test_equal_answers_to_two_prompts_are_no_duplicates() -> None:
    counts = count_answers([_table(("a", 0, [5, 3], [5, 3], "stop"), ("b", 0, [6, 3], [5, 3], "stop"))])
    assert (counts["duplicate_share"], counts["equal_share"]) == (0, 0.5)
