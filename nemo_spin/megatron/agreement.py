"""What all ranks do alike: finish a step or not, and decide by what the first of them sees.

A rank that leaves a collective function early leaves the others waiting until a time-out
ends the run with a message about the network instead of the full disk. One that looks for itself
which files there are may see others: clients of a network file system remember a directory for a
minute and more.
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


def from_first_rank(decide: Callable[[], T]) -> T:
    """What `decide` returns on rank 0, which alone calls it. All ranks must call.

    Every look at storage goes through it on which depends what ranks do together.

    Args:
        decide: Its result is pickled.

    Raises:
        Exception: What `decide` raised; on other ranks by its type's name.
    """
    if not distributed.is_initialized():
        return decide()
    outcome: list[Any] = [None, None]  # the result, or the error's type and message
    error: Exception | None = None
    if distributed.get_rank() == 0:
        try:
            outcome[0] = decide()
        except Exception as caught:  # whatever it is, the others must hear of it
            error = caught
            outcome[1] = (type(caught).__name__, str(caught))
    distributed.broadcast_object_list(outcome, src=0)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise error_from_name(*outcome[1])
    result: T = outcome[0]
    return result


def merged(own: dict[str, T]) -> dict[str, T]:
    """The entries of all ranks' mappings, on every rank. All ranks must call."""
    if not distributed.is_initialized():
        return own
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, own)
    return {key: value for part in parts for key, value in part.items()}
