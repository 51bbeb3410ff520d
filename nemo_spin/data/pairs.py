"""Reads the rows that stages leave behind, in an order that does not depend on sharding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nemo_spin.data.columns import PREPARED, SCORED
from nemo_spin.errors import DataError, explain

_ROW_KEY = ("iteration", "id", "sample")


def read_prepared(path: Path) -> pa.Table:
    """The rows of a prepared split, in the order of the demonstrations.

    Raises:
        DataError: The file is not there, or is not such a file.
    """
    return _read(path, PREPARED)


def prepared_rows(data_dir: Path, split: str) -> pa.Table:
    """The prepared rows of `split` in a run's data directory.

    Raises:
        DataError: As `read_prepared`.
    """
    return read_prepared(data_dir / f"{split}.parquet")


def has_rows(directory: Path, split: str) -> bool:
    """Whether there is a file of `split`, prepared or scored; no held-out demonstrations, no such file."""
    return (directory / f"{split}.parquet").exists() or bool(shard_paths(directory, split))


def shard_paths(directory: Path, split: str) -> list[Path]:
    """The parquet files of `split` in a stage's directory, by name."""
    return sorted(directory.glob(f"{split}-*.parquet"))


def iter_shards(directory: Path, split: str, *, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yields the shards of `split`, each with exactly the columns of `schema`.

    Raises:
        DataError: There is none, or one cannot be read.
    """
    paths = shard_paths(directory, split)
    if not paths:
        raise DataError(
            explain(
                f"{directory}/{split}-*.parquet",
                found="there is no such file",
                rule="an earlier stage of the iteration writes them",
                remedy="run that stage first; `nemo-spin status` shows which are done",
            )
        )
    for path in paths:
        yield _read(path, schema)


def training_rows(scored_dir: Path, split: str) -> pa.Table:
    """All scored rows of a split, sorted by iteration, id and sample.

    The result is the same however the rows were spread over files.

    Args:
        scored_dir: An iteration's `scored` directory.
        split: `train` or `heldout`.

    Returns:
        A table with the columns of `columns.SCORED`.

    Raises:
        DataError: There is no scored file, one cannot be read, or a row is there twice.
    """
    table = pa.concat_tables(iter_shards(scored_dir, split, schema=SCORED))
    order = pc.sort_indices(table.select(_ROW_KEY), sort_keys=[(name, "ascending") for name in _ROW_KEY])
    table = table.take(order)
    _check_unique(table, scored_dir, split)
    return table


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        table = pq.read_table(path, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, str(error).splitlines()[0][:200] if str(error) else "unreadable") from error
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise _damaged(path, f"has no column {', '.join(missing)}")
    table = table.select(schema.names)
    if not table.schema.equals(schema):
        wrong = [field.name for field in schema if table.schema.field(field.name).type != field.type]
        if wrong:
            raise _damaged(path, f"column {', '.join(wrong)} has another type than it was written with")
        table = table.cast(schema)
    return table


def _check_unique(table: pa.Table, directory: Path, split: str) -> None:
    """Neighbours of the sorted table must differ in their key."""
    if table.num_rows < 2:
        return
    same = None
    for name in _ROW_KEY:
        column = table.column(name).combine_chunks()
        equal = pc.equal(column.slice(1), column.slice(0, len(column) - 1))
        same = equal if same is None else pc.and_(same, equal)
    if same is not None and pc.any(same).as_py():
        row = table.slice(pc.index(same, True).as_py(), 1).select(_ROW_KEY).to_pylist()[0]
        raise DataError(
            explain(
                f"{directory}/{split}-*.parquet",
                found=f"hold the row {row} twice",
                rule="every sample of a prompt is there once for each iteration",
                remedy=f"remove {directory} and start the same command again: the stage is redone",
            )
        )


def _damaged(path: Path, found: str) -> DataError:
    return DataError(
        explain(
            str(path),
            found=found,
            rule="a parquet file as an earlier stage wrote it",
            remedy=f"remove {path.parent} and start the same command again: the stage is redone",
        )
    )
