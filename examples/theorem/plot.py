"""A line plot with a logarithmic axis, as an SVG file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

_WIDTH, _HEIGHT = 720, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 190, 44, 48  # margins, in pixels
_COLOURS = ("#0b6e4f", "#1f77b4", "#9467bd", "#e08214", "#c1272d", "#444444")


@dataclass(frozen=True)
class Line:
    """One line: a positive value for 0, 1, 2, …; `dashed` lines are something else than solid ones."""

    name: str
    values: Sequence[float]
    dashed: bool = False


def write_plot(path: Path, lines: Sequence[Line], *, title: str, x_label: str, low: float) -> None:
    """Draws `lines`; values below `low` lie on the lower edge."""
    last = max(len(line.values) for line in lines) - 1
    bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(max(max(line.values) for line in lines)))

    def x(number: float) -> float:
        return _LEFT + number / last * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        share = (math.log10(max(value, low)) - bottom) / (top - bottom)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="24" font-size="15">{escape(title)}</text>',
        f'<text x="{x(last / 2):.0f}" y="{_HEIGHT - 12}" text-anchor="middle">{escape(x_label)}</text>',
    ]
    for power in range(bottom, top + 1):
        at = y(10.0**power)
        parts.append(f'<path d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}" stroke="#dddddd"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">1e{power}</text>')
    for number in range(last + 1):
        at = _HEIGHT - _BOTTOM + 18
        parts.append(f'<text x="{x(number):.1f}" y="{at}" text-anchor="middle">{number}</text>')
    for i, line in enumerate(lines):
        points = " ".join(f"{x(n):.1f},{y(value):.1f}" for n, value in enumerate(line.values))
        style = f'stroke="{_COLOURS[i % len(_COLOURS)]}" stroke-width="2" fill="none"'
        style += ' stroke-dasharray="6 4"' if line.dashed else ""
        parts.append(f'<polyline points="{points}" {style}/>')
        key, at = _WIDTH - _RIGHT + 12, _TOP + 12 + 20 * i
        parts.append(f'<path d="M{key} {at}h24" {style}/>')
        parts.append(f'<text x="{key + 30}" y="{at + 4}">{escape(line.name)}</text>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")
