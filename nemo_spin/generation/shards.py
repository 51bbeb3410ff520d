"""Shards of answers: how rows are cut into them, written, and checked before they are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nemo_spin.data.columns import GENERATED, TOKEN_IDS
from nemo_spin.data.files import atomic_path
from nemo_spin.errors import DataError, explain
from nemo_spin.generation.engine import Answer
from nemo_spin.generation.request import Pass, ShardPlan

_ROW_COLUMNS = ["id", "prompt_ids", "real_ids"]


def plan_shards(name: str, rows: int, shard_rows: int) -> tuple[ShardPlan, ...]:
    """Cuts `rows` prompts into shards of `shard_rows`, the last one smaller.

    Args:
        name: Begins the files' names.
        rows: Prompts in all.
        shard_rows: Prompts in a shard.
    """
    starts = range(0, rows, shard_rows)
    return tuple(
        ShardPlan(
            file=f"{name}-shard-{index:05d}-of-{len(starts):05d}.parquet",
            start=start,
            rows=min(shard_rows, rows - start),
        )
        for index, start in enumerate(starts)
    )


class PreparedRows:
    """Ranges of a prepared file; keeps the row groups it read last, and no more.

    Args:
        path: Parquet file with the columns `id`, `prompt_ids`, `real_ids`.

    Raises:
        DataError: It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(path, error) from error
        metadata = self._file.metadata
        self.num_rows: int = metadata.num_rows
        self._ends: list[int] = []
        for group in range(metadata.num_row_groups):
            self._ends.append((self._ends[-1] if self._ends else 0) + metadata.row_group(group).num_rows)
        self._groups: list[int] = []
        self._table = pa.table({})

    def read(self, start: int, rows: int) -> pa.Table:
        """Rows `start` to `start + rows`.

        Raises:
            DataError: The file cannot be read, or is shorter.
        """
        if start + rows > self.num_rows:
            raise _unreadable(self._path, f"has {self.num_rows} rows, of {start + rows} asked for")
        begins = [0, *self._ends[:-1]]
        groups = [
            group
            for group, (begin, end) in enumerate(zip(begins, self._ends, strict=True))
            if begin < start + rows and end > start
        ]
        if groups != self._groups:
            try:
                self._table = self._file.read_row_groups(groups, columns=_ROW_COLUMNS)
            except (OSError, pa.ArrowException) as error:
                raise _unreadable(self._path, error) from error
            self._groups = groups
        offset = begins[groups[0]] if groups else 0
        return self._table.slice(start - offset, rows)


def answers_table(rows: pa.Table, answers: Sequence[Answer], generation: Pass) -> pa.Table:
    """Joins prompts and answers: `num_generations` neighbouring rows for each prompt.

    Args:
        rows: The prepared rows of a shard.
        answers: Theirs: all samples of the first row, then of the second.
        generation: What was asked.
    """
    repeats = generation.num_generations
    taken = rows.take([row for row in range(rows.num_rows) for _ in range(repeats)])
    count = len(answers)
    columns = {
        "id": taken["id"],
        "sample": pa.array(list(range(repeats)) * rows.num_rows, pa.int32()),
        "iteration": pa.array([generation.iteration] * count, pa.int32()),
        "prompt_ids": taken["prompt_ids"],
        "real_ids": taken["real_ids"],
        "generated_ids": pa.array([answer.token_ids for answer in answers], TOKEN_IDS),
        "finish_reason": pa.array([answer.finish_reason for answer in answers], pa.string()),
        "sampler_logps": pa.array([sum_logps(answer.logps) for answer in answers], pa.float64()),
        "num_sampler_tokens": pa.array([len(answer.logps) for answer in answers], pa.int32()),
        "opponent_sha256": pa.array([generation.opponent_sha256] * count, pa.string()),
    }
    return pa.table(columns).cast(GENERATED).combine_chunks()  # the same bytes, however rows were read


def sum_logps(logps: Sequence[float]) -> float:
    """The float64 sum, rounded once, whatever the order."""
    return math.fsum(logps)


def write_shard(path: Path, table: pa.Table) -> None:
    """Writes a whole shard or none; equal tables give equal bytes, and one that is there stays.

    Raises:
        DataError: The disk is full.
    """
    with atomic_path(path, first_wins=True) as partial:
        pq.write_table(table, partial, compression="zstd", use_dictionary=False, write_page_checksum=True)


def shard_damage(path: Path, plan: ShardPlan, generation: Pass, prepared: PreparedRows) -> str | None:
    """What is wrong with a shard that was left behind; None if it holds exactly what was asked."""
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
    except (OSError, pa.ArrowException) as error:
        return f"cannot be read ({_first_line(error)})"
    if not table.schema.equals(GENERATED):
        return "has other columns"
    rows = prepared.read(plan.start, plan.rows)
    repeats = generation.num_generations
    if table.num_rows != rows.num_rows * repeats:
        return f"has {table.num_rows} rows instead of {rows.num_rows * repeats}"
    wanted = rows.take([row for row in range(rows.num_rows) for _ in range(repeats)])
    if any(not table[name].equals(wanted[name].cast(GENERATED.field(name).type)) for name in _ROW_COLUMNS):
        return "holds other prompts"
    identity = (
        ("sample", list(range(repeats)) * rows.num_rows),
        ("iteration", [generation.iteration] * table.num_rows),
        ("opponent_sha256", [generation.opponent_sha256] * table.num_rows),
    )
    for name, values in identity:
        if table[name].to_pylist() != values:
            return f"has another {name}"
    return None


def _unreadable(path: Path, error: Exception | str) -> DataError:
    return DataError(
        explain(
            str(path),
            found=f"cannot be read ({_first_line(error)})",
            rule="a parquet file as `prepare` wrote it",
            remedy=f"remove {path.parent} and start the same command again: it is prepared again",
        )
    )


def _first_line(error: Exception | str) -> str:
    return (str(error).strip().splitlines() or ["unreadable"])[0][:200]
