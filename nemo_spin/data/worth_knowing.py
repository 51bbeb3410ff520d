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


def length_note(counts: Mapping[str, Any], *, max_tokens: int) -> str | None:
    """Says that many demonstrations are longer than an answer may be, or None where few are.

    An answer that is cut has no end token, a demonstration of that length has one: telling them
    apart takes no knowledge of what they say.

    Args:
        counts: Of the manifest that `prepare` wrote.
        max_tokens: `generation.max_tokens`.
    """
    lengths = counts.get("train", {}).get("real_length", {})
    longer = {"p50": "half", "p90": "a tenth"}  # as many do not exceed a percentile
    share = next((words for name, words in longer.items() if lengths.get(name, 0) > max_tokens), None)
    if share is None:
        return None
    return (
        f"train: more than {share} of the demonstrations are longer than generation.max_tokens={max_tokens} "
        f"(median {lengths['p50']:,} tokens, longest {lengths['max']:,}). Answers are cut there and have no "
        "end, so length alone tells them apart: raise generation.max_tokens, or lower "
        "data.max_response_length to it"
    )
