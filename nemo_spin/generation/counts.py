"""Counts over answers: what a look at a stage's result must show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc


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
        seen: set[tuple[str, tuple[int, ...]]] = set()
        columns = ("id", "generated_ids", "real_ids", "finish_reason")
        for row_id, generated, real, reason in zip(
            *(table[name].to_pylist() for name in columns), strict=True
        ):
            self._empty += reason == "stop" and len(generated) == 1
            self._equal += generated == real
            key = (row_id, tuple(generated))
            self._duplicates += key in seen
            seen.add(key)

    def summary(self) -> dict[str, Any]:
        """Name -> value. Lengths are in tokens, the stop token included; shares are of the answers.

        `empty_share` counts answers that are nothing but the stop token, `equal_share` those
        that are the demonstration token for token, `duplicate_share` those that repeat an
        earlier sample of the same prompt.
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
        }


def count_answers(tables: Iterable[pa.Table]) -> dict[str, Any]:
    """`AnswerCounts.summary` of all tables."""
    counts = AnswerCounts()
    for table in tables:
        counts.add(table)
    return counts.summary()


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
