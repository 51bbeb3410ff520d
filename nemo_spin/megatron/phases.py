"""Phases of a stage that all ranks enter together, with a limit on the time one may be late.

A collective that a rank never enters fails on the others after the process group's time-out,
and says neither where nor who. So ranks meet at the beginning of each phase through the key-value
store that they joined by, which works whatever the backend; and where one breaks off inside a phase,
they find out through it who is still there.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from typing import Any

from torch import distributed

from nemo_spin.errors import StageError, explain

_KEY = "launcher.collective_timeout_s"
_PREFIX = "nemo_spin/phase"
_LAST_WORDS_S = 5.0  # for ranks to say that they broke off, too


class Phases:
    """The phases of one rank; all ranks have the same.

    Args:
        store: Shared by all ranks.
        rank: Of this one.
        world_size: How many there are.
        timeout_s: How long others are waited for.
    """

    def __init__(
        self,
        store: Any,
        *,
        rank: int,
        world_size: int,
        timeout_s: float,
        key: str = "launcher.collective_timeout_s",
    ) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._number = 0
        self.name = "starting"

    def enter(self, name: str) -> None:
        """Returns when all ranks have come. All ranks must call.

        Raises:
            StageError: Some did not come in time; it names them.
        """
        self.name = name
        self._number += 1
        if self._world_size == 1:
            return
        here = f"{_PREFIX}/{self._number}"
        try:
            self._store.set(f"{here}/{self._rank}", name)
            if self._store.add(f"{here}/count", 1) == self._world_size:
                self._store.set(f"{here}/all", "1")
            self._store.wait([f"{here}/all"], datetime.timedelta(seconds=self._timeout_s))
        except RuntimeError as error:  # torch's DistStoreError and DistNetworkError among them
            missing = self._missing(here)
            raise self._failed(f"{missing} did not reach the phase in {self._timeout_s:g} s") from error

    def broke_off(self, error: BaseException) -> StageError:
        """The error for a collective that failed inside a phase: with the ranks that have not broken off.

        They are those that hang, or are gone; a rank that failed by itself is named in its own log.

        Args:
            error: What this rank met.
        """
        here = f"{_PREFIX}/{self._number}/broken"
        with contextlib.suppress(RuntimeError):
            self._store.set(f"{here}/{self._rank}", "1")
        time.sleep(_LAST_WORDS_S)
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        return self._failed(f"it broke off in the phase: {first}; no word from {self._missing(here)}")

    def _missing(self, key: str) -> str:
        """The ranks that have not set their part of `key`."""
        try:
            missing = [rank for rank in range(self._world_size) if not self._store.check([f"{key}/{rank}"])]
        except RuntimeError:
            return "rank 0, which holds the store"
        if not missing:
            return "nobody: all are there by now"
        return f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"

    def _failed(self, found: str) -> StageError:
        return StageError(
            explain(
                f'phase "{self.name}" on rank {self._rank}',
                found=found,
                rule=f"all ranks enter a phase, and its collectives, within {_KEY}",
                remedy="look at the logs of those ranks, and at their machines; raise "
                f"{_KEY} if they only need longer",
            )
        )


def is_of_a_collective(error: BaseException) -> bool:
    """Whether an exception is what is left of a collective whose other ranks are late or gone."""
    kinds = (distributed.DistBackendError, distributed.DistNetworkError, distributed.DistStoreError)
    words = ("Timed out waiting", "Connection closed by peer", "Connection reset by peer", "Socket Timeout")
    return isinstance(error, kinds) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
