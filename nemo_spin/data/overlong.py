"""Units that are longer than a packed row may be: what `prepare` and training say about them.

A unit is never split. One that is longer than `model.micro_batch_tokens` makes a row of its
own, which needs the memory of a row that long: better known before than out of memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_spin.data.datasets import Units

if TYPE_CHECKING:  # it imports torch, which `prepare` does without
    from nemo_spin.data.packing import Layout


@dataclass(frozen=True)
class RowLimit:
    """How long a packed row may be, and what comes to a demonstration later.

    Attributes:
        packing: `shared_prompt` or `pairs`.
        micro_batch_tokens: Most token positions of a row.
        num_generations: Generated answers of a prompt; 0 where none are made.
        max_tokens: Most tokens of an answer.
    """

    packing: str
    micro_batch_tokens: int
    num_generations: int
    max_tokens: int

    def unit_tokens(self, prompts: np.ndarray, real: np.ndarray, *, answer: int) -> np.ndarray:
        """Token positions of units whose answers have `answer` tokens each. [rows] int64."""
        copies = 1 + self.num_generations if self.packing == "pairs" else 1
        tokens: np.ndarray = copies * prompts + real + self.num_generations * answer
        return tokens


@dataclass
class OverlongRows:
    """Rows of one split whose units are, or may become, longer than a packed row.

    Attributes:
        limit: What they are compared with.
        possible: Rows that exceed it if every answer is as long as it may be.
        certain: Rows that exceed it even with answers of one token.
        longest: Token positions of the longest unit, its answers as long as they may be.
    """

    limit: RowLimit
    possible: int = 0
    certain: int = 0
    longest: int = 0

    def add(self, prompts: np.ndarray, real: np.ndarray) -> None:
        """Counts rows of these numbers of tokens in. [rows] each."""
        most = self.limit.unit_tokens(prompts, real, answer=self.limit.max_tokens)
        least = self.limit.unit_tokens(prompts, real, answer=1)
        self.possible += int((most > self.limit.micro_batch_tokens).sum())
        self.certain += int((least > self.limit.micro_batch_tokens).sum())
        self.longest = max(self.longest, int(most.max(initial=0)))

    def summary(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "micro_batch_tokens": self.limit.micro_batch_tokens,
            "possible": self.possible,
            "certain": self.certain,
            "longest": self.longest,
        }

    def note(self, split: str, rows: int) -> str | None:
        """One line with the remedy, or None where every unit fits."""
        if not self.possible:
            return None
        limit, answers = self.limit, self.limit.num_generations
        found = f"{split}: {self.possible:,} of {rows:,} rows "
        if answers:
            found += (
                f"may become longer than model.micro_batch_tokens={limit.micro_batch_tokens} with "
                f"{answers} {'answer' if answers == 1 else 'answers'} of generation.max_tokens="
                f"{limit.max_tokens} ({self.certain:,} whatever the answers)"
            )
            settings = "generation.max_tokens, data.max_prompt_length or data.max_response_length"
        else:
            found += f"are longer than model.micro_batch_tokens={limit.micro_batch_tokens}"
            settings = "data.max_prompt_length or data.max_response_length"
        return f"{found}; {_consequence(self.longest)}, or lower {settings}"


def training_note(layout: Layout, units: Units) -> str | None:
    """What to say before training about units that are alone in a row, or None."""
    if layout.packing == "none" or not units.num_units:
        return None
    tokens = layout.unit_tokens(units, np.arange(units.num_units))
    number = int((tokens > layout.micro_batch_tokens).sum())
    if not number:
        return None
    return (
        f"{number:,} of {units.num_units:,} units are longer than model.micro_batch_tokens="
        f"{layout.micro_batch_tokens}; {_consequence(int(tokens.max()))}"
    )


def _consequence(longest: int) -> str:
    return (
        f"such a unit is a microbatch of its own, of up to {longest:,} tokens: if memory does not "
        f"allow that, use more tensor or context parallelism"
    )
