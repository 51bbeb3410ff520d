"""A rank's sign of life, and which phase it is in: a file that it touches every few seconds."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

_BEAT_S = 5.0
_BEATS = 4  # in the time that a watchdog waits


def heartbeat_path(progress_path: Path, rank: int) -> Path:
    """Where rank `rank` of the stage that reports to `progress_path` shows that it lives."""
    return progress_path.with_name(f"{progress_path.name}.rank-{rank:05d}.alive")


class Heartbeat:
    """Touches a file until the process ends; one that is stopped or waits for a disk does not.

    Args:
        path: The file; it holds the phase.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        self._beat_s = _BEAT_S
        self.phase("starting")
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def watched(self, silent_s: float) -> None:
        """A watchdog waits for `silent_s`: from the next touch on it is often enough for that."""
        self._beat_s = min(_BEAT_S, silent_s / _BEATS)

    def phase(self, name: str) -> None:
        """The rank enters a phase."""
        with contextlib.suppress(OSError):  # such as a full disk: the stage itself will say so
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, name.encode(), 0)

    def _beat(self) -> None:
        never = threading.Event()
        while not never.wait(self._beat_s):
            with contextlib.suppress(OSError):
                os.utime(self._file)
