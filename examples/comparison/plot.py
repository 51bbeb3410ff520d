"""Right answers by optimizer steps, as an SVG file: a panel for each regime and way to answer."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from examples.comparison.arms import FINE_TUNING, START, Row
from examples.comparison.table import greedy, sampled

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 380, 240, 56, 56, 56  # of a panel and around it, in pixels
_COLOURS = ("#0b6e4f", "#1f77b4", "#9467bd", "#e08214", "#8c564b", "#444444", "#17a2b8", "#8a9a2b")
_FINE_TUNING = ("#c1272d", "#d4749b", "#e8a33d")  # dashed
_TICKS = 5
WAYS: dict[str, Callable[[Row], float]] = {"sampled": sampled, "greedy": greedy}


@dataclass(frozen=True)
class Point:
    """A model: its optimizer steps from theta_0, and its share of right answers over seeds."""

    steps: float
    mean: float
    deviation: float


def lines_of(rows: Sequence[Row], value: Callable[[Row], float]) -> dict[str, list[Point]]:
    """Arm -> theta_0 and its models in order; fine-tuning for different numbers of steps is one line.

    Args:
        rows: Of one regime, all seeds.
        value: What is drawn of each.
    """
    models: dict[tuple[str, int | None], list[Row]] = {}
    for row in rows:
        models.setdefault((row["arm"], row["iteration"]), []).append(row)
    start = next(_point(same, value) for same in models.values() if same[0]["kind"] == START)
    lines: dict[str, list[Point]] = {}
    for same in models.values():
        if same[0]["kind"] != START:
            lines.setdefault(_line_name(same[0]), [start]).append(_point(same, value))
    return {name: sorted(points, key=lambda point: point.steps) for name, points in lines.items()}


def write_plot(path: Path, rows: Sequence[Row]) -> None:
    """Draws all regimes side by side; bars are standard deviations over seeds."""
    regimes = list(dict.fromkeys(row["regime"] for row in rows))
    names = list(dict.fromkeys(_line_name(row) for row in rows if row["kind"] != START))
    legend = _TOP + len(WAYS) * (_HEIGHT + _GAP)
    width = len(regimes) * (_WIDTH + _LEFT) + 24
    height = legend + 20 * ((len(names) + 1) // 2) + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{_LEFT}" y="24" font-size="15">Right answers by optimizer steps</text>',
    ]
    for column, regime in enumerate(regimes):
        chosen = [row for row in rows if row["regime"] == regime]
        for line, (way, value) in enumerate(WAYS.items()):
            place = (_LEFT + column * (_WIDTH + _LEFT), _TOP + line * (_HEIGHT + _GAP))
            parts += _panel(place, f"{regime}: {way}", lines_of(chosen, value), names)
    for i, name in enumerate(names):
        x, y = _LEFT + (i % 2) * (width - _LEFT) // 2, legend + 20 * (i // 2)
        parts.append(f'<path d="M{x} {y}h24" {_style(names, name)}/>')
        parts.append(f'<text x="{x + 30}" y="{y + 4}">{escape(name)}</text>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def _panel(
    place: tuple[int, int], title: str, lines: dict[str, list[Point]], names: Sequence[str]
) -> list[str]:
    left, top = place
    points = [point for line in lines.values() for point in line]
    last = max(1.0, *(point.steps for point in points))
    low = min(point.mean - point.deviation for point in points)
    high = max(low + 0.01, *(point.mean + point.deviation for point in points))  # however flat

    def x(steps: float) -> float:
        return left + steps / last * _WIDTH

    def y(share: float) -> float:
        return top + (high - share) / (high - low) * _HEIGHT

    parts = [f'<text x="{left}" y="{top - 10}" font-weight="bold">{escape(title)}</text>']
    for number in range(_TICKS):
        share = low + (high - low) * number / (_TICKS - 1)
        steps = last * number / (_TICKS - 1)
        parts.append(f'<path d="M{left} {y(share):.1f}h{_WIDTH}" stroke="#dddddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y(share) + 4:.1f}" text-anchor="end">{share:.2f}</text>')
        at = f'x="{x(steps):.1f}" y="{top + _HEIGHT + 18}"'
        parts.append(f'<text {at} text-anchor="middle">{steps:.0f}</text>')
    for name, line in lines.items():
        style = _style(names, name)
        path = " ".join(f"{x(point.steps):.1f},{y(point.mean):.1f}" for point in line)
        parts.append(f'<polyline points="{path}" {style} fill="none"/>')
        for point in line:
            bar = f"M{x(point.steps):.1f} {y(point.mean - point.deviation):.1f}"
            parts.append(f'<path d="{bar}V{y(point.mean + point.deviation):.1f}" {style} opacity="0.5"/>')
    return parts


def _point(rows: Sequence[Row], value: Callable[[Row], float]) -> Point:
    values = [value(row) for row in rows]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return Point(statistics.mean(row["steps"] for row in rows), statistics.mean(values), deviation)


def _line_name(row: Row) -> str:
    if row["kind"] != FINE_TUNING:
        return str(row["arm"])
    rate = str(row["arm"]).partition(", lr ")[2]
    return f"fine-tuning, lr {rate}" if rate else "fine-tuning"


def _style(names: Sequence[str], name: str) -> str:
    tuned = [each for each in names if each.startswith(FINE_TUNING)]
    if name in tuned:
        return f'stroke="{_FINE_TUNING[tuned.index(name) % 3]}" stroke-width="2" stroke-dasharray="6 3"'
    played = [each for each in names if each not in tuned]
    return f'stroke="{_COLOURS[played.index(name) % len(_COLOURS)]}" stroke-width="2"'
