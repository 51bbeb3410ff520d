"""Which earlier answers an iteration trains on, and which prompts it asks: seeded choices by id."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def num_chosen(amount: float, total: int) -> int:
    """How many of `total` prompts `amount` means: a share up to 1, or a number above it."""
    return min(total, round(amount * total) if amount <= 1 else int(amount))


def chosen(total: int, number: int, *, seed: Sequence[int]) -> np.ndarray:
    """`number` of the positions below `total`, in order; the first of a permutation.

    A larger number with the same seed chooses the same and more.
    """
    permuted = np.random.default_rng([*seed]).permutation(total)
    return np.sort(permuted[:number])


def chosen_ids(ids: pa.ChunkedArray, amount: float, *, seed: Sequence[int]) -> pa.Array:
    """The ids of the prompts whose answers are mixed in.

    Args:
        ids: Of all rows of an iteration; several rows may have one id.
        amount: See `num_chosen`; of prompts, not of rows.
        seed: Whole numbers that decide the choice.
    """
    distinct = pc.unique(ids).sort()  # whatever the order of rows was
    return distinct.take(pa.array(chosen(len(distinct), num_chosen(amount, len(distinct)), seed=seed)))
