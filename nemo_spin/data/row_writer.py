"""Writes rows so that a file's bytes depend on the rows alone, and names them so that none is there twice."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP_ROWS = 2048


class RowWriter:
    """A parquet file written in row groups of fixed size, whatever sizes rows come in.

    Args:
        path: The file.
        schema: Its columns.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False)
        self._schema = schema
        self._held: list[pa.RecordBatch] = []
        self._num_held = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None:
            self._flush(self._num_held)
        self._writer.close()

    def write(self, batch: pa.RecordBatch) -> None:
        """Adds rows."""
        self._held.append(batch)
        self._num_held += batch.num_rows
        while self._num_held >= ROW_GROUP_ROWS:
            self._flush(ROW_GROUP_ROWS)

    def _flush(self, rows: int) -> None:
        table = pa.Table.from_batches(self._held, self._schema).combine_chunks()
        if rows:
            self._writer.write_table(table.slice(0, rows), row_group_size=ROW_GROUP_ROWS)
        self._held = table.slice(rows).to_batches()
        self._num_held -= rows


class UniqueIds:
    """Makes the ids of a split differ: the second `x` becomes `x-1`, in input order."""

    def __init__(self) -> None:
        self._next: dict[str, int] = {}

    def __call__(self, name: str) -> str:
        """`name`, or `name` with the first number that makes it new."""
        unique = name
        while unique in self._next:
            unique = f"{name}-{self._next[name]}"
            self._next[name] += 1
        self._next[unique] = 1
        return unique
