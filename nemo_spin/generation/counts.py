"""Counts over answers: what a look at a stage's result must show."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_RUN, _REPETITIVE_TOKENS = 4, 16


class AnswerCounts:
    """Counts answers, table by table."""

    def __init__(self) -> None:
        self._answers = 0
        self._prompts = 0
        self._cut = 0
        self._stopped = 0
        self._empty = 0
        self._equal = 0
        self._duplicates = 0
        self._repetitive = 0
        self._distinct: set[bytes] = set()
        self._lengths: Counter[int] = Counter()
        self._real_lengths: Counter[int] = Counter()

    def add(self, table: pa.Table) -> None:
        """Counts a table of answers (`columns.GENERATED`), all samples of a row in it."""
        lengths = pc.list_value_length(table["generated_ids"]).to_pylist()
        reasons = Counter(table["finish_reason"].to_pylist())
        self._answers += table.num_rows
        self._cut += reasons["length"]
        self._stopped += reasons["stop"]
        self._lengths.update(lengths)
        first = table.filter(pc.equal(table["sample"], 0))
        self._prompts += first.num_rows
        self._real_lengths.update(pc.list_value_length(first["real_ids"]).to_pylist())
        seen: set[tuple[str, bytes]] = set()
        columns = (table["id"].to_pylist(), _as_bytes(table["generated_ids"]), _as_bytes(table["real_ids"]))
        for row_id, generated, real in zip(*columns, strict=True):
            self._equal += generated == real
            self._duplicates += (row_id, generated) in seen
            seen.add((row_id, generated))
            self._repetitive += is_repetitive(np.frombuffer(generated, dtype=np.int32))
            self._distinct.add(hashlib.blake2b(generated, digest_size=12).digest())
        stopped = pc.equal(table["finish_reason"], "stop")
        alone = pc.equal(pc.list_value_length(table["generated_ids"]), 1)
        self._empty += pc.sum(pc.and_(stopped, alone)).as_py() or 0

    def summary(self) -> dict[str, Any]:
        """Name -> value. Lengths are in tokens, the stop token included; shares are of the answers.

        `empty_share` counts answers that are nothing but the stop token, `equal_share` those
        that are the demonstration token for token, `duplicate_share` those that repeat an
        earlier sample of the same prompt; `repetitive_share` those that are mostly repetition
        (`is_repetitive`); `distinct_share` is the number of different
        answers, whatever the prompt, against all answers.
        """
        answers = max(self._answers, 1)
        return {
            "rows": self._answers,
            "prompts": self._prompts,
            "tokens": sum(length * count for length, count in self._lengths.items()),
            "mean_length": _mean(self._lengths),
            "median_length": _median(self._lengths),
            "real_mean_length": _mean(self._real_lengths),
            "real_median_length": _median(self._real_lengths),
            "cut_share": self._cut / answers,
            "eos_share": self._stopped / answers,
            "empty_share": self._empty / answers,
            "equal_share": self._equal / answers,
            "duplicate_share": self._duplicates / answers,
            "repetitive_share": self._repetitive / answers,
            "distinct_share": len(self._distinct) / answers,
        }


def count_answers(tables: Iterable[pa.Table]) -> dict[str, Any]:
    """`AnswerCounts.summary` of all tables."""
    counts = AnswerCounts()
    for table in tables:
        counts.add(table)
    return counts.summary()


def is_repetitive(ids: np.ndarray) -> bool:
    """Whether an answer of at least 16 tokens says half of its runs of four tokens more than once."""
    if len(ids) < _REPETITIVE_TOKENS:
        return False
    runs = np.lib.stride_tricks.sliding_window_view(ids, _RUN)
    return len(np.unique(runs, axis=0)) <= len(runs) / 2


def _as_bytes(column: pa.ChunkedArray) -> list[bytes]:
    """The token ids of each row as bytes: quick to compare."""
    array = column.combine_chunks()
    values = array.values.to_numpy(zero_copy_only=False)
    offsets = array.offsets.to_numpy()
    return [values[begin:end].tobytes() for begin, end in itertools.pairwise(offsets)]


def _mean(lengths: Counter[int]) -> float:
    return sum(length * count for length, count in lengths.items()) / max(lengths.total(), 1)


def _median(lengths: Counter[int]) -> float:
    """The middle value; between the two in the middle where their number is even."""
    total = lengths.total()
    if total == 0:
        return 0.0
    ordered = sorted(lengths.items())
    return (_at(ordered, (total - 1) // 2) + _at(ordered, total // 2)) / 2


def _at(ordered: list[tuple[int, int]], position: int) -> int:
    passed = 0
    for length, count in ordered:
        passed += count
        if passed > position:
            return length
    raise AssertionError("a position beyond the end")
