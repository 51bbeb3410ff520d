"""Steps that all ranks finish, or none: an error on one rank is raised on all.

A rank that leaves a collective function early leaves the others waiting until a time-out
ends the run with a message about the network instead of the full disk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

from nemo_spin.errors import error_from_name

T = TypeVar("T")


def together(step: Callable[[], T]) -> T:
    """Runs `step` on this rank, then waits for the others. All ranks must call.

    A step must go through all of its own collectives whatever fails in it.

    Raises:
        Exception: What this rank's step raised; else what another's did, by its type's name.
    """
    result: T | None = None
    error: Exception | None = None
    try:
        result = step()
    except Exception as caught:  # whatever it is, the others must hear of it
        error = caught
    if distributed.is_initialized():
        failures: list[Any] = [None] * distributed.get_world_size()
        own = (type(error).__name__, str(error)) if error is not None else None
        distributed.all_gather_object(failures, own)
        if error is None:
            for rank, failure in enumerate(failures):
                if failure is not None:
                    raise error_from_name(failure[0], f"{failure[1]}\n  (found by rank {rank})")
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def from_first_rank(value: T) -> T:
    """Rank 0's `value`. All ranks must call."""
    if not distributed.is_initialized():
        return value
    values: list[Any] = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def merged(own: dict[str, T]) -> dict[str, T]:
    """The entries of all ranks' mappings, on every rank. All ranks must call."""
    if not distributed.is_initialized():
        return own
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, own)
    return {key: value for part in parts for key, value in part.items()}
