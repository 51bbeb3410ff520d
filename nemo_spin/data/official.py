"""The data sets and folders of the official code, uclaml/SPIN: found, read and written.

Its rows have the columns `real` and `generated`, each a list of messages: a prompt and a
response. It samples into `loser_N.jsonl` and `loser_N_test.jsonl`, one pair of files for
each part of the prompts, and trains from `train_prefs-*.parquet` and `test_prefs-*.parquet`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from nemo_spin.data.sources import JsonSource, ParquetSource, Piece, Source

_LOSER = re.compile(r"loser_(\d+)(_test)?\.jsonl")
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
PAIRS = pa.schema([("real", _MESSAGES), ("generated", _MESSAGES)])
SPLIT_NAMES = {"train": "train", "heldout": "test"}


def official_files(directory: Path, split: str) -> list[Path]:
    """The files of a split in a folder of the official code, in its order; none where it is no such folder.

    Args:
        directory: Any directory.
        split: `train` or `test`.
    """
    parts = {}
    for path in directory.glob("loser_*.jsonl"):
        match = _LOSER.fullmatch(path.name)
        if match is not None and ("test" if match[2] else "train") == split:
            parts[int(match[1])] = path
    return [parts[number] for number in sorted(parts)] or sorted(directory.glob(f"{split}_prefs-*.parquet"))


def parquet_path(directory: Path, split: str) -> Path:
    """Where the official code looks for a split (`train` or `heldout`)."""
    return directory / f"{SPLIT_NAMES[split]}_prefs-00000-of-00001.parquet"


class ConcatenatedSource:
    """Several files, one after the other.

    Args:
        paths: parquet or JSON files, at least one.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._sources: list[Source] = [
            ParquetSource(path) if path.suffix == ".parquet" else JsonSource(path) for path in paths
        ]

    def columns(self) -> list[str]:
        """See `Source.columns`: those that all files with rows have."""
        every = [names for source in self._sources if (names := source.columns())]
        return [name for name in every[0] if all(name in names for names in every)] if every else []

    def pieces(self, columns: list[str]) -> Iterator[tuple[Piece, int]]:
        """See `Source.pieces`; rows are numbered over all files, totals are those of the files so far."""
        first = 0
        for source in self._sources:
            rows = 0
            for piece, total in source.pieces(columns):
                numbers = [first + number for number in piece.numbers]
                rows = piece.numbers[-1] + 1
                yield Piece(numbers, records=piece.records, batch=piece.batch), first + total
            first += rows
