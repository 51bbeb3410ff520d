"""Histograms whose series share their bins, so that iterations can be laid over each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nemo_spin.report.metrics import short
from nemo_spin.report.pair_values import PairValues

_MOST_BINS = 40
_TAIL = 0.5  # per cent at either end that goes into the outermost bins


def histogram(series: Mapping[str, np.ndarray], *, whole: bool = False) -> dict[str, Any] | None:
    """Counts values in common bins.

    Args:
        series: Label -> values; not-finite ones are left out.
        whole: The values are whole numbers (tokens): bins begin at 0 and have whole widths.

    Returns:
        `edges` (one more than bins; values beyond the ends are in the outermost bins),
        and `series` with `label`, `counts`, `number`, `mean` and `median` each; None where
        there is nothing to count.
    """
    finite = {label: values[np.isfinite(values)] for label, values in series.items()}
    finite = {label: values for label, values in finite.items() if len(values)}
    if not finite:
        return None
    edges = _edges(np.concatenate(list(finite.values())), whole=whole)
    return {
        "edges": [short(float(edge)) for edge in edges],
        "series": [
            {
                "label": label,
                "counts": np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].tolist(),
                "number": len(values),
                "mean": short(float(values.mean())),
                "median": short(float(np.median(values))),
            }
            for label, values in finite.items()
        ],
    }


def _edges(values: np.ndarray, *, whole: bool) -> np.ndarray:
    bins = max(8, min(_MOST_BINS, int(len(values) ** 0.5)))
    if whole:
        longest = int(np.percentile(values, 100 - _TAIL, method="higher"))
        width = max(1, -(-(longest + 1) // bins))
        return np.arange(0, (longest // width + 2) * width, width)
    low, high = np.percentile(values, [_TAIL, 100 - _TAIL])
    if low == high:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, bins + 1)


def histograms(values: Sequence[tuple[str, PairValues]]) -> list[dict[str, Any]]:
    """The histograms of a run.

    Args:
        values: Label of each iteration and what is known of its pairs.

    Returns:
        Those that have anything to show, each with `title`, `about` and `unit` besides
        what `histogram` returns.
    """
    lengths: dict[str, np.ndarray] = {}
    margins: dict[str, np.ndarray] = {}
    changes: dict[str, np.ndarray] = {}
    logps: dict[str, np.ndarray] = {}
    ends = {values[0][0], values[-1][0]} if values else set()
    for label, of_pairs in values:
        if "train" in of_pairs.generated_lengths:
            lengths.setdefault("demonstrations", of_pairs.real_lengths["train"])
            lengths[f"answers, {label}"] = of_pairs.generated_lengths["train"]
        if of_pairs.margins is not None:
            margins[label] = of_pairs.margins["margin"].to_numpy()
        for split, table in of_pairs.real_changes.items():
            changes[f"{label}{', held-out' if split == 'heldout' else ''}"] = table["change"].to_numpy()
        if "train" in of_pairs.real_logps_per_token and label in ends:
            logps[f"demonstrations, {label}"] = of_pairs.real_logps_per_token["train"]
            logps[f"answers, {label}"] = of_pairs.generated_logps_per_token["train"]
    described = [
        ("Response lengths", "of the training pairs, closing EOS included", "tokens", lengths),
        ("Margins after the iteration", "of its own training pairs, one by one", "", margins),
        (
            "Change of the demonstrations’ log-probability",
            "by an iteration, per response; below 0 the policy has moved away from the demonstrations",
            "nats",
            changes,
        ),
        (
            "Log-probability under the opponent",
            "mean per token of each training response, before the first and the last iteration",
            "nats per token",
            logps,
        ),
    ]
    made = []
    for title, about, unit, series in described:
        counted = histogram(series, whole=unit == "tokens")
        if counted:
            made.append({"title": title, "about": about, "unit": unit, **counted})
    return made
