"""What of a stage's counts is the same whenever and wherever the stage runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MEASURED = (
    "_seconds",
    "_per_second",
    "_per_second_with_scoring",
    "model_tflops",
    "peak_share",
    "peak_memory_gib",
)


def lasting(counts: Mapping[str, Any]) -> dict[str, Any]:
    """Counts without times, rates and memory."""
    return {name: value for name, value in counts.items() if not name.endswith(_MEASURED)}
