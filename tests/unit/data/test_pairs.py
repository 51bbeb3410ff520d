from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_spin.data.columns import PREPARED, SCORED, joined, with_large_lists
from nemo_spin.data.pairs import (
    has_rows,
    iter_shards,
    prepared_rows,
    read_prepared,
    shard_paths,
    training_rows,
)
from nemo_spin.errors import DataError


def scored(iteration: int, name: str, sample: int = 0) -> dict[str, Any]:
    return {
        "id": name,
        "sample": sample,
        "iteration": iteration,
        "prompt_ids": [1, 2, iteration],
        "real_ids": [3],
        "generated_ids": [4, sample],
        "finish_reason": "stop",
        "sampler_logps": -1.5,
        "num_sampler_tokens": 2,
        "opponent_sha256": "0" * 64,
        "opponent_real_logps": -2.0,
        "opponent_generated_logps": -3.0,
    }


ROWS = [scored(i, f"id-{n}", sample) for i in (0, 1) for n in range(7) for sample in (0, 1)]


def write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema = SCORED) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema), path)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), num_shards=st.integers(1, 6))
def test_the_order_does_not_depend_on_the_shards(
    tmp_path_factory: pytest.TempPathFactory, seed: int, num_shards: int
) -> None:
    directory = tmp_path_factory.mktemp("scored")
    rows = list(ROWS)
    random.Random(seed).shuffle(rows)
    for shard in range(num_shards):
        write(
            directory / f"train-iter_00-shard-{shard:05d}-of-{num_shards:05d}.parquet",
            rows[shard::num_shards],
        )
    write(directory / "heldout-iter_00-shard-00000-of-00001.parquet", ROWS[:1])
    table = training_rows(directory, "train")
    assert table.cast(SCORED).to_pylist() == ROWS  # ROWS is sorted by iteration, id and sample
    assert training_rows(directory, "heldout").num_rows == 1


def test_an_iteration_may_have_more_than_2_to_the_31_tokens() -> None:
    """Nulls stand in for token ids: 3 billion of them take no memory, and the offsets are the same."""
    most = 3 * 2**29
    piece = pa.ListArray.from_arrays(pa.array([0, most, most + 1], pa.int32()), pa.nulls(most + 1))
    rows = pa.table({"row": [0, 1, 2, 3], "real_ids": pa.chunked_array([piece, piece])})
    with pytest.raises(pa.ArrowInvalid, match="overflow"):
        rows["real_ids"].combine_chunks()
    ids = joined(rows["real_ids"])
    assert ids.offsets.to_pylist() == [0, most, most + 1, 2 * most + 1, 2 * most + 2]
    assert with_large_lists(rows).take([3, 1]).to_pylist() == [
        {"row": 3, "real_ids": [None]},
        {"row": 1, "real_ids": [None]},
    ]


def test_two_rows_with_one_key_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train-iter_00-shard-00000-of-00002.parquet", ROWS)
    write(tmp_path / "train-iter_00-shard-00001-of-00002.parquet", [ROWS[5]])
    with pytest.raises(DataError, match=r"'iteration': 0, 'id': 'id-2', 'sample': 1.*twice"):
        training_rows(tmp_path, "train")


def test_a_split_without_files_is_an_error(tmp_path: Path) -> None:
    assert shard_paths(tmp_path, "train") == []
    with pytest.raises(DataError, match=r"train-\*\.parquet"):
        training_rows(tmp_path, "train")


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "train-iter_00-shard-00000-of-00001.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="shard-00000"):
        training_rows(tmp_path, "train")
    write(path, [], pa.schema([("id", pa.string())]))
    with pytest.raises(DataError, match="has no column sample"):
        training_rows(tmp_path, "train")
    wrong = pa.schema([*list(SCORED)[:-1], ("opponent_generated_logps", pa.float32())])
    write(path, ROWS, wrong)
    with pytest.raises(DataError, match="opponent_generated_logps has another type"):
        training_rows(tmp_path, "train")


def test_more_columns_than_asked_for_are_left_out(tmp_path: Path) -> None:
    more = pa.schema([*SCORED, ("note", pa.string())])
    write(tmp_path / "train-a.parquet", [{**row, "note": "x"} for row in ROWS], more)
    assert training_rows(tmp_path, "train").column_names == SCORED.names
    assert has_rows(tmp_path, "train") and not has_rows(tmp_path, "heldout")
    assert [table.num_rows for table in iter_shards(tmp_path, "train", schema=SCORED)] == [len(ROWS)]


def test_prepared_rows_keep_the_order_of_the_demonstrations(tmp_path: Path) -> None:
    rows = [
        {"id": name, "prompt_ids": [1], "real_ids": [2], "prompt_text": "p", "real_text": "r"}
        for name in "zab"
    ]
    write(tmp_path / "train.parquet", rows, PREPARED)
    assert read_prepared(tmp_path / "train.parquet").to_pylist() == rows
    assert prepared_rows(tmp_path, "train")["id"].to_pylist() == ["z", "a", "b"]
    assert has_rows(tmp_path, "train") and not has_rows(tmp_path, "heldout")
    with pytest.raises(DataError, match=r"heldout\.parquet"):
        prepared_rows(tmp_path, "heldout")
