"""Reads the rows that stages leave behind, in an order that does not depend on sharding."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nemo_spin.data.columns import PREPARED, PREPARED_GIVEN, SCORED, joined, with_large_lists
from nemo_spin.errors import DataError, explain

_ROW_KEY = ("iteration", "id", "sample")
Listing = Callable[[Path, str], list[Path]]


def read_prepared(path: Path) -> pa.Table:
    """The rows of a prepared split, in the order of the demonstrations.

    Raises:
        DataError: The file is not there, or is not such a file.
    """
    return _read(path, PREPARED)


def read_given(path: Path) -> pa.Table:
    """The rows of a prepared split with the answers that came with them.

    Raises:
        DataError: As `read_prepared`.
    """
    return _read(path, PREPARED_GIVEN)


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


def iter_shards(
    directory: Path, split: str, *, schema: pa.Schema, listing: Listing = shard_paths
) -> Iterator[pa.Table]:
    """Yields the shards of `split`, each with exactly the columns of `schema`.

    Args:
        directory: A stage's directory.
        split: `train` or `heldout`.
        schema: The columns.
        listing: Names the shards. Ranks that read the same rows pass one by which they agree.

    Raises:
        DataError: There is none, or one cannot be read.
    """
    paths = listing(directory, split)
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


def training_rows(scored_dir: Path, split: str, *, listing: Listing = shard_paths) -> pa.Table:
    """All scored rows of a split, sorted by iteration, id and sample.

    The result is the same however the rows were spread over files.

    Args:
        scored_dir: An iteration's `scored` directory.
        split: `train` or `heldout`.
        listing: See `iter_shards`.

    Returns:
        A table with the columns of `columns.SCORED`, token ids as large lists.

    Raises:
        DataError: There is no scored file, one cannot be read, or a row is there twice.
    """
    table = with_large_lists(pa.concat_tables(iter_shards(scored_dir, split, schema=SCORED, listing=listing)))
    order = pc.sort_indices(table.select(_ROW_KEY), sort_keys=[(name, "ascending") for name in _ROW_KEY])
    table = table.take(order)
    _check_unique(table, scored_dir, split)
    return table


def without_identical(rows: pa.Table) -> pa.Table:
    """The rows whose two responses differ.

    Raises:
        DataError: None does.
    """
    responses = (_row_bytes(rows[name]) for name in ("real_ids", "generated_ids"))  # Arrow compares no lists
    differ = [real != generated for real, generated in zip(*responses, strict=True)]
    if rows.num_rows and not any(differ):
        raise DataError(
            explain(
                f"all {rows.num_rows} training pairs",
                found="are a demonstration and the very same answer",
                rule="pairs of different responses are learnt from",
                remedy="nothing is left to learn from these prompts: stop, or use other demonstrations",
            )
        )
    return rows.filter(pa.array(differ, pa.bool_()))


def _row_bytes(column: pa.ChunkedArray) -> Iterator[bytes]:
    """The bytes of each row's token ids."""
    ids = joined(column)
    offsets, values = ids.offsets.to_numpy(), ids.values.to_numpy(zero_copy_only=False)
    return (values[begin:end].tobytes() for begin, end in itertools.pairwise(offsets))


def with_base(
    rows: pa.Table, directories: Sequence[Path], split: str, *, listing: Listing = shard_paths
) -> pa.Table:
    """Adds theta_0's log-probabilities: columns `base_real_logps` and `base_generated_logps`.

    Args:
        rows: Scored rows of a split.
        directories: Hold the same rows, and maybe others, with theta_0 as the opponent.
        split: `train` or `heldout`.
        listing: See `iter_shards`.

    Raises:
        DataError: As `iter_shards`, or a row is not there.
    """
    base = pa.concat_tables(
        shard
        for directory in directories
        for shard in iter_shards(directory, split, schema=SCORED, listing=listing)
    )
    found = pc.index_in(_key(rows), _key(base))
    if found.null_count:
        row = rows.slice(pc.index(pc.is_null(found), True).as_py(), 1).select(_ROW_KEY).to_pylist()[0]
        raise DataError(
            explain(
                ", ".join(f"{directory}/{split}-*.parquet" for directory in directories),
                found=f"the row {row} is not there",
                rule="every row that is trained on was scored under theta_0, for spin.opponent_mix",
                remedy="remove scored/ of the iterations that are mixed in, and start the same command again",
            )
        )
    for kind in ("real", "generated"):
        rows = rows.append_column(f"base_{kind}_logps", base[f"opponent_{kind}_logps"].take(found))
    return rows


def _key(rows: pa.Table) -> pa.ChunkedArray:
    """What names a row, as one text; the id, which may hold anything, comes last."""
    numbers = (rows[name].cast(pa.string()) for name in ("iteration", "sample"))
    return pc.binary_join_element_wise(*numbers, rows["id"], " ")


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
