"""Settings that may differ between the iterations of self-play."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def at_iteration(value: T | Sequence[T], iteration: int) -> T:
    """The value that holds in `iteration`, counted from 0.

    Args:
        value: A scalar, which holds in all of them, or a list with one value for each
            (`nemo_spin.config.validate` has checked its length).
        iteration: Number of the iteration.
    """
    if not isinstance(value, (list, tuple)):
        return value  # type: ignore[return-value]  # a Sequence[T] is a list or a tuple here
    assert 0 <= iteration < len(value), f"iteration {iteration} of a list of {len(value)}"
    chosen: T = value[iteration]
    return chosen
