from __future__ import annotations

import itertools
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_spin.data import row_writer
from nemo_spin.data.row_writer import RowWriter, UniqueIds

SCHEMA = pa.schema([("text", pa.string()), ("ids", pa.list_(pa.int32()))])


@given(st.lists(st.sampled_from(["a", "a-1", "a-1-1", "a-2", "b", "b-1"]), max_size=30))
def test_unique_ids_are_unique_and_the_same_each_time(names: list[str]) -> None:
    one, two = UniqueIds(), UniqueIds()
    made = [one(name) for name in names]
    assert len(set(made)) == len(names)
    assert made == [two(name) for name in names]
    assert all(unique.startswith(name) for unique, name in zip(made, names, strict=True))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 7000), max_size=6))
def test_bytes_do_not_depend_on_the_sizes_rows_came_in(tmp_path: Path, cuts: list[int]) -> None:
    columns = {"text": [f"t{i}" for i in range(7000)], "ids": [[i] * (i % 3) for i in range(7000)]}
    rows = pa.RecordBatch.from_pydict(columns, SCHEMA)
    edges = [0, *sorted(cuts), 7000]
    written = []
    for name, borders in (("whole", [0, 7000]), ("parts", edges)):
        with RowWriter(tmp_path / name, SCHEMA) as writer:
            for first, last in itertools.pairwise(borders):
                writer.write(rows.slice(first, last - first))
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]
    file = pq.ParquetFile(tmp_path / "parts")
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert groups == [row_writer.ROW_GROUP_ROWS] * 3 + [7000 - 3 * row_writer.ROW_GROUP_ROWS]
    assert file.read().to_pylist() == rows.to_pylist()
