"""What became of the rows of a split: counts for the manifest and the screen."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow.compute as pc

from nemo_spin.data.encode import EncodedPiece
from nemo_spin.data.overlong import OverlongRows


@dataclass
class SplitCounts:
    """What became of the rows of one split."""

    rows: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # by reason
    prompt_lengths: Counter[int] = field(default_factory=Counter)  # tokens -> rows
    real_lengths: Counter[int] = field(default_factory=Counter)
    cut_prompts: int = 0
    cut_responses: int = 0
    overlong: OverlongRows | None = None  # None: rows have no limit

    def add(self, piece: EncodedPiece) -> None:
        """Counts one piece in."""
        self.rows += piece.batch.num_rows
        self.refused.update(refusal.reason for refusal in piece.refusals)
        self.cut_prompts += piece.num_cut_prompts
        self.cut_responses += piece.num_cut_responses
        prompts, real = (
            pc.list_value_length(piece.batch.column(name)).to_numpy(zero_copy_only=False)
            for name in ("prompt_ids", "real_ids")
        )
        self.prompt_lengths.update(prompts.tolist())
        self.real_lengths.update(real.tolist())
        if self.overlong is not None:
            self.overlong.add(prompts, real)

    @property
    def all_rows(self) -> int:
        """Accepted and refused ones."""
        return self.rows + self.refused.total()

    def summary(self) -> dict[str, Any]:
        """For the manifest."""
        overlong = {"overlong": self.overlong.summary()} if self.overlong is not None else {}
        return {
            **overlong,
            "rows": self.rows,
            "quarantined": self.refused.total(),
            "quarantined_by_reason": dict(self.refused.most_common()),
            "cut_prompts": self.cut_prompts,
            "cut_responses": self.cut_responses,
            "prompt_tokens": _total(self.prompt_lengths),
            "real_tokens": _total(self.real_lengths),
            "prompt_length": percentiles(self.prompt_lengths),
            "real_length": percentiles(self.real_lengths),
        }


def percentiles(lengths: Counter[int]) -> dict[str, int]:
    """Smallest lengths (tokens) that 50, 90, 99 and 100 percent of the rows do not exceed."""
    total, seen = lengths.total(), 0
    shares = {"p50": 50, "p90": 90, "p99": 99, "max": 100}
    found: dict[str, int] = {}
    for length in sorted(lengths):
        seen += lengths[length]
        found.update(
            {
                name: length
                for name, share in shares.items()
                if name not in found and seen * 100 >= share * total
            }
        )
    return found


def _total(lengths: Counter[int]) -> int:
    return sum(length * rows for length, rows in lengths.items())
