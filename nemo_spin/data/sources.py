"""Rows of a data set as they lie on disk or on the hub, in pieces of bounded size.

A source never holds more than a piece in memory, and where its pieces begin depends on
the data alone. Text is split into records here and parsed by the workers that tokenize:
a record that is no JSON, or no UTF-8, is one refused row and not the end of the run.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from nemo_spin.config.schema import DataConfig
from nemo_spin.data.json_records import Record, is_array, read_array, read_lines
from nemo_spin.errors import DataError, explain

PIECE_ROWS = 512
PIECE_BYTES = 16 << 20
PARQUET_SUFFIXES = (".parquet",)
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".zst")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_LOOKED_AT_ROWS = 100  # of a JSON file, to learn its columns


@dataclass(frozen=True)
class Piece:
    """Some consecutive rows, still packed.

    Attributes:
        numbers: The row number of each, from 0 (in a JSONL file: of its line).
        records: JSON texts as bytes, or None.
        batch: An Arrow stream with one table, or None.
    """

    numbers: range | list[int]
    records: list[bytes] | None = None
    batch: bytes | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def first(self, count: int) -> Piece:
        """The piece's first `count` rows."""
        if count >= len(self):
            return self
        records = None if self.records is None else self.records[:count]
        return Piece(self.numbers[:count], records=records, batch=self.batch)


class Source(Protocol):
    """A data set that can be read from its beginning, piece by piece."""

    def columns(self) -> list[str]:
        """Names of its columns; an empty list where there is no row."""

    def pieces(self, columns: list[str]) -> Iterator[tuple[Piece, int]]:
        """Yields each piece with the (expected) number of rows in all.

        Raises:
            DataError: The data cannot be read on.
        """


def open_source(spec: str, *, key: str, split: str, config: DataConfig) -> Source:
    """Finds out what `spec` is: a file, a directory or a hub data set.

    Args:
        spec: Value of `data.train` or `data.heldout`.
        key: That key, for messages.
        split: Split of a hub data set or a directory.
        config: Subset and revision of a hub data set.

    Raises:
        DataError: There is nothing under that name, or nothing that can be read.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED_SUFFIXES]
        suffix = suffixes[-1].lower() if suffixes else ""
        if suffix in PARQUET_SUFFIXES:
            return ParquetSource(path)
        if suffix in JSON_SUFFIXES:
            return JsonSource(path)
        known = ", ".join((*PARQUET_SUFFIXES, *JSON_SUFFIXES))
        raise DataError(
            explain(
                f"{key}={spec}",
                found=f"ends in {path.suffix or 'no suffix'}",
                rule=f"a data file is one of {known} (JSON may be compressed: .gz, .bz2, .zst)",
                remedy="convert the file, or rename it if its name is wrong",
            )
        )
    if path.is_dir() and config.format == "spin":
        from nemo_spin.data.official import ConcatenatedSource, official_files

        files = official_files(path, split)
        if files:
            return ConcatenatedSource(files)
    if path.is_dir() or is_hub_id(spec):
        return DatasetsSource(spec, key=key, split=split, subset=config.subset, revision=config.revision)
    raise DataError(
        explain(
            f"{key}={spec}",
            found="there is no such file",
            rule="an existing parquet, JSON or JSONL file, a directory of them, or a hub data set "
            "(organisation/name)",
            remedy="check the path; relative ones start at the current directory",
        )
    )


def is_hub_id(spec: str) -> bool:
    """Whether `spec` can only be meant as a data set on the hub."""
    is_file_name = spec.lower().endswith((*PARQUET_SUFFIXES, *JSON_SUFFIXES, *COMPRESSED_SUFFIXES))
    return _HUB_ID.fullmatch(spec) is not None and not is_file_name


def pack(table: pa.Table, first: int) -> Piece:
    """A piece of the rows of `table`, of which the first has the number `first`."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return Piece(range(first, first + table.num_rows), batch=sink.getvalue().to_pybytes())


class ParquetSource:
    """A local parquet file, read page by page."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def columns(self) -> list[str]:
        """See `Source.columns`."""
        with self._open() as file:
            return list(file.schema_arrow.names)

    def pieces(self, columns: list[str]) -> Iterator[tuple[Piece, int]]:
        """See `Source.pieces`."""
        with self._open() as file, _reading(self._path):
            first, total = 0, file.metadata.num_rows
            batches = file.iter_batches(batch_size=PIECE_ROWS, columns=columns, use_threads=False)
            for batch in batches:
                yield pack(pa.Table.from_batches([batch]), first), total
                first += batch.num_rows

    @contextlib.contextmanager
    def _open(self) -> Iterator[pq.ParquetFile]:
        with _reading(self._path):
            file = pq.ParquetFile(self._path, buffer_size=1 << 20, pre_buffer=False)
        with file:
            yield file


class JsonSource:
    """A local file with one JSON object a line, or with one JSON array of objects."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = path.stat().st_size

    def columns(self) -> list[str]:
        """See `Source.columns`: those of the first rows."""
        names: dict[str, None] = {}
        seen = 0
        for seen, record in enumerate(self._records(), start=1):
            if seen > _LOOKED_AT_ROWS:
                break
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(record.text)
                names.update(dict.fromkeys(value) if isinstance(value, dict) else {})
        return list(names) if names or not seen else ["(no row of it is a JSON object)"]

    def pieces(self, columns: list[str]) -> Iterator[tuple[Piece, int]]:
        """See `Source.pieces`; the number of rows in all is an estimate by bytes read."""
        del columns  # the workers that parse take what they need
        numbers: list[int] = []
        texts: list[bytes] = []
        done = held = 0
        position = 0
        for record in self._records():
            if texts and (len(texts) == PIECE_ROWS or held + len(record.text) > PIECE_BYTES):
                done += len(texts)
                yield Piece(numbers, records=texts), self._total(done, position)
                numbers, texts, held = [], [], 0
            numbers.append(record.number)
            texts.append(record.text)
            held += len(record.text)
            position = record.position
        if texts:
            yield Piece(numbers, records=texts), done + len(texts)

    def _total(self, done: int, position: int) -> int:
        return max(done, round(done * self._size / position)) if position else done

    def _records(self) -> Iterator[Record]:
        with _reading(self._path), self._open() as (stream, raw):
            yield from (read_array if is_array(stream) else read_lines)(stream, raw.tell)

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
        with self._path.open("rb") as raw:
            if self._path.suffix not in COMPRESSED_SUFFIXES:
                yield raw, raw
                return
            codec = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}[self._path.suffix]
            unpacked = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), codec)
            yield io.BufferedReader(unpacked, 1 << 20), raw


class DatasetsSource:
    """A directory of data files or a data set on the hub, streamed by `datasets`.

    `datasets` runs no code of a data set: loading scripts are gone from it.
    """

    def __init__(self, spec: str, *, key: str, split: str, subset: str | None, revision: str | None) -> None:
        self._spec = spec
        self._path = Path(spec).expanduser()
        self._key = key
        self._split = split
        self._subset = subset
        self._revision = revision

    def columns(self) -> list[str]:
        """See `Source.columns`."""
        with self._reading():
            for table in self._load().iter(batch_size=1):
                return list(table.column_names)
            return []

    def pieces(self, columns: list[str]) -> Iterator[tuple[Piece, int]]:
        """See `Source.pieces`."""
        with self._reading():
            dataset = self._load()
            split = (dataset.info.splits or {}).get(self._split)
            first, total = 0, split.num_examples if split is not None else 0
            for table in dataset.select_columns(columns).iter(batch_size=PIECE_ROWS):
                piece = pack(table, first)
                first += len(piece)
                yield piece, max(total, first)

    def _load(self) -> Any:
        import datasets

        datasets.logging.set_verbosity_error()
        datasets.disable_progress_bars()
        return datasets.load_dataset(
            str(self._path) if self._path.is_dir() else self._spec,
            self._subset,
            split=self._split,
            revision=self._revision,
            streaming=True,
        ).with_format("arrow")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Words what `datasets` and the hub's client raise: dozens of types without a common base."""
        try:
            yield
        except Exception as error:
            missing = "" if self._path.is_dir() else "there is no such file, and "
            said = f"{type(error).__name__}: {_first_line(error)}"
            raise DataError(
                explain(
                    f"{self._key}={self._spec}",
                    found=f"{missing}`datasets` cannot read split {self._split!r} ({said})",
                    rule="a local file, a directory of parquet/JSON files, or a data set on the hub",
                    remedy="check name, split and subset (data.train_split, data.heldout_split, "
                    "data.subset) and the network; gated data sets need a login (`hf auth login`)",
                )
            ) from error


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Words what pyarrow and the file system raise while `path` is read."""
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            explain(
                str(path),
                found=f"cannot be read ({_first_line(error)})",
                rule="a whole, readable data file of the kind that its name says",
                remedy="download or write the file again, and check its permissions",
            )
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
