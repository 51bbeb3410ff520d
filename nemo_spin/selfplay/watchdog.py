"""Ends a stage one of whose ranks hangs: stopped, waiting for a disk, or on a machine that is gone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from nemo_spin.errors import StageError, explain
from nemo_spin.selfplay.heartbeat import heartbeat_path

_LOOKS = 100  # in the time after which a rank hangs: every look opens a file of every rank
_SHORTEST_LOOK_S = 1.0
_NO_PHASE = "not started"


@dataclass
class _Seen:
    """A rank's file as it was when it last changed, and when that was on our own clock."""

    touched_ns: int | None
    phase: str
    since: float


class Watchdog:
    """Looks at the signs of life of all ranks.

    Only changes count, and the time between them on this process's own clock: clocks of other
    machines are never compared with ours.

    Args:
        name: The stage, for messages.
        progress_path: Of the stage; the ranks' files lie beside it.
        ranks: How many there are.
        silent_s: Seconds without a sign of life after which a rank hangs.
    """

    def __init__(self, name: str, *, progress_path: Path, ranks: int, silent_s: float) -> None:
        self._name = name
        self._paths = [heartbeat_path(progress_path, rank) for rank in range(ranks)]
        for path in self._paths:
            path.unlink(missing_ok=True)  # of an earlier attempt
        self._silent_s = silent_s
        self._look_s = max(_SHORTEST_LOOK_S, silent_s / _LOOKS)
        self._looked = time.monotonic()
        self._seen = [_Seen(None, _NO_PHASE, self._looked) for _ in self._paths]

    def check(self) -> None:
        """Takes a look, not more than once a second, nor more often than a hundredth of the limit.

        Raises:
            StageError: Ranks are silent; they are named, with the phase that they were in.
        """
        now = time.monotonic()
        if now - self._looked < self._look_s:
            return
        if now - self._looked > self._silent_s / 2:  # it is we who were stopped: look again before judging
            for seen in self._seen:
                seen.since = now
        self._looked = now
        for index, path in enumerate(self._paths):
            self._look(index, path, now)
        silent = [rank for rank, seen in enumerate(self._seen) if now - seen.since > self._silent_s]
        if silent:
            raise self._hung(silent)

    def phases(self) -> str:
        """Where all ranks are, such as `ranks 0, 1 in "train"; rank 2 in "starting"`."""
        now = time.monotonic()
        for index, path in enumerate(self._paths):
            self._look(index, path, now)
        return self._where(list(range(len(self._seen))))

    def _look(self, index: int, path: Path, now: float) -> None:
        try:
            with path.open("rb") as stream:  # opening it, NFS asks the server for its times
                phase = stream.read(200).decode(errors="replace")
            touched_ns = path.stat().st_mtime_ns
        except OSError:
            return
        seen = self._seen[index]
        if (touched_ns, phase or seen.phase) != (seen.touched_ns, seen.phase):
            self._seen[index] = _Seen(touched_ns, phase or seen.phase, now)

    def _where(self, ranks: list[int]) -> str:
        by_phase: dict[str, list[int]] = {}
        for rank in ranks:
            by_phase.setdefault(self._seen[rank].phase, []).append(rank)
        return "; ".join(f'{_named(members)} in "{phase}"' for phase, members in by_phase.items())

    def _hung(self, silent: list[int]) -> StageError:
        others = [rank for rank in range(len(self._seen)) if rank not in silent]
        rest = f"; meanwhile {self._where(others)}" if others else ""
        return StageError(
            explain(
                self._name,
                found=f"{self._where(silent)} gave no sign of life for {self._silent_s:g} s{rest}; "
                "all were ended",
                rule="every rank touches its file within launcher.hang_timeout_s",
                remedy="look for a machine or a file system that hangs, and at the ranks' logs; "
                "the same command goes on where it was",
            )
        )


def _named(ranks: list[int]) -> str:
    """Such as `rank 3` or `ranks 0, 1, 5`; of many only the first."""
    shown = ", ".join(map(str, ranks[:16])) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
