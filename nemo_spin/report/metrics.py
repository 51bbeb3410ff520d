"""The curves of a training: `metrics.jsonl` as columns, in few enough points to draw."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MAX_POINTS = 2000  # per iteration and metric; longer trainings are averaged over neighbouring steps

Columns = dict[str, list[float | None]]


def read_metrics(path: Path) -> dict[str, Any]:
    """The lines of a training as columns.

    Args:
        path: metrics.jsonl. A line that was cut short (the training may be running) is
            left out; of several lines of one step the last one counts.

    Returns:
        `train` and `heldout`: column -> one value per line, `step` among the columns;
        `averaged`: how many steps one point of `train` stands for; `not_finite`: the first
        steps at which a value was no number, by column.
    """
    lines = [line for line in _lines(path) if isinstance(line.get("step"), (int, float))]
    of_split = {
        split: {line["step"]: line for line in lines if line.get("split") == split}
        for split in ("train", "heldout")
    }
    rows = {split: [by_step[step] for step in sorted(by_step)] for split, by_step in of_split.items()}
    train, heldout = ([_derived(row) for row in rows[split]] for split in ("train", "heldout"))
    every = max(1, math.ceil(len(train) / MAX_POINTS))
    return {
        "train": _columns(train, every),
        "heldout": _columns(heldout, 1),
        "averaged": every,
        "steps": len(train),
        "not_finite": _not_finite([*train, *heldout]),
    }


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def _derived(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line, with the opponent's log-probabilities per token."""
    numbers = {key: float(value) for key, value in row.items() if _is_number(value)}
    for kind in ("real", "generated"):
        logps, tokens = numbers.get(f"opponent_{kind}_logps"), numbers.get(f"{kind}_tokens")
        if logps is not None and tokens:
            numbers[f"opponent_{kind}_logps_per_token"] = logps / tokens
        policy = numbers.get(f"policy_{kind}_logps_per_token")
        opponent = numbers.get(f"opponent_{kind}_logps_per_token")
        if policy is not None and opponent is not None:
            numbers[f"{kind}_gain_per_token"] = policy - opponent
    return numbers


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _columns(rows: list[dict[str, float]], every: int) -> Columns:
    """One list per column; each value the mean of `every` rows, None where there is no number."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    groups = [rows[start : start + every] for start in range(0, len(rows), every)]
    return {name: [_mean([row[name] for row in group if name in row]) for group in groups] for name in names}


def _mean(values: list[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return short(sum(finite) / len(finite)) if finite else None


def short(value: float) -> float:
    """`value` with seven digits: more cannot be seen, and costs bytes."""
    return float(f"{value:.7g}")


def _not_finite(rows: Iterable[Mapping[str, float]]) -> dict[str, int]:
    first: dict[str, int] = {}
    for row in rows:
        for name, value in row.items():
            if not math.isfinite(value):
                first.setdefault(name, int(row["step"]))
    return first
