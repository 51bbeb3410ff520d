"""From rows of all seeds to tables: means, and standard deviations over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from examples.comparison.arms import KINDS, Row

Columns = dict[str, tuple[int, Callable[[Row], float | None]]]  # name -> (digits, value of a row)


def sampled(row: Row) -> float:
    """The chance that a sampled answer is right."""
    return float(row["sampled"]["1.0"])


def greedy(row: Row) -> float:
    """The share of prompts whose likeliest answer is right."""
    return float(row["greedy"])


_COLUMNS: Columns = {
    "steps": (0, lambda row: row["steps"]),
    "sampled": (3, sampled),
    "at T 0.7": (3, lambda row: row["sampled"]["0.7"]),
    "at T 0.5": (3, lambda row: row["sampled"]["0.5"]),
    "greedy": (3, greedy),
    "NLL": (3, lambda row: row["nll"]),
    "real change": (2, lambda row: row.get("real_change")),
    "equal": (2, lambda row: row.get("equal_share")),
}


def _share(kind: str) -> Callable[[Row], float]:
    return lambda row: row["answers"][kind]


_KINDS: Columns = {kind: (3, _share(kind)) for kind in KINDS}


def tables(rows: Sequence[Row], *, whole: bool = True) -> str:
    """All tables, as Markdown: a section for each regime, in the order of the rows.

    Args:
        rows: Of all seeds.
        whole: Every iteration, and what kinds of answers there are; else the last model of each arm.
    """
    if not whole:
        rows = last_models(rows)
    parts = []
    for regime in dict.fromkeys(row["regime"] for row in rows):
        chosen = [row for row in rows if row["regime"] == regime]
        parts.append(f"**{regime}**\n\n{markdown(chosen, _COLUMNS)}")
        if whole:
            parts.append(f"One drawn answer to each prompt:\n\n{markdown(chosen, _KINDS)}")
    return "\n\n".join(parts)


def last_models(rows: Sequence[Row]) -> list[Row]:
    """Of each seed, regime and arm the row of the model it ends with."""
    last = {(row["seed"], row["regime"], row["arm"]): row for row in rows}
    return list(last.values())


def markdown(rows: Sequence[Row], columns: Columns) -> str:
    """One line for each arm and iteration; `±` is the standard deviation over seeds."""
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for arm, iteration in dict.fromkeys((row["arm"], row["iteration"]) for row in rows):
        same = [row for row in rows if (row["arm"], row["iteration"]) == (arm, iteration)]
        cells = [_cell([value(row) for row in same], digits) for digits, value in columns.values()]
        lines.append(f"| {label(arm, iteration)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def compared(rows: Sequence[Row], known: Sequence[Row]) -> str:
    """How many rows are, to the last bit, those of an earlier run; and which are not, and by how much."""

    def key(row: Row) -> tuple[object, ...]:
        return row["seed"], row["regime"], row["arm"], row["iteration"]

    before = {key(row): row for row in known}
    both = [(row, before[key(row)]) for row in rows if key(row) in before]
    lines = [f"{sum(now == then for now, then in both)} of {len(rows)} rows are those in results/"]
    for now, then in both:
        if now != then:
            name = f"seed {now['seed']}: {now['regime']}: {label(now['arm'], now['iteration'])}"
            changes = f"sampled {sampled(now) - sampled(then):+.2g}, greedy {greedy(now) - greedy(then):+.2g}"
            lines.append(f"  {name}: {changes}")
    return "\n".join(lines)


def label(arm: str, iteration: int | None) -> str:
    """Names a model: `self-play: theta_2`."""
    return arm if iteration is None else f"{arm}: theta_{iteration}"


def _cell(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    text = f"{statistics.mean(known):.{digits}f}"
    return text if len(known) == 1 or not digits else f"{text} ± {statistics.stdev(known):.{digits}f}"
