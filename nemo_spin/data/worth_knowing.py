"""What prepared data shows that may spoil a run: for the screen and the report, never an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def overlap_note(counts: Mapping[str, Any]) -> str | None:
    """Says that held-out prompts are training prompts too, or None where none is.

    Args:
        counts: Of the manifest that `prepare` wrote.
    """
    heldout = counts.get("heldout", {})
    shared = heldout.get("also_in_train")
    if not shared:
        return None
    return (
        f"heldout: {shared:,} of {heldout['rows']:,} prompts are in data.train too: held-out numbers are "
        "partly of what was trained on; leave these rows out of one of the two"
    )
