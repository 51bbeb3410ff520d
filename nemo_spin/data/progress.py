"""How a stage's process tells the command that started it how far it is.

A stage runs in processes of its own (ranks, a sampler, tokenizing workers); the command
on the user's terminal follows a file of JSON lines that one of them appends to. Whatever
the process prints goes to its log, so third-party noise never reaches the screen.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Protocol

from nemo_spin.errors import NemoSpinError


class Progress(Protocol):
    """What a long-running function reports to."""

    def update(self, done: int, total: int, unit: str, **values: Any) -> None:
        """States that `done` of `total` `unit`s are finished; `values` are shown beside the bar."""

    def note(self, text: str) -> None:
        """One line worth a user's attention."""


class SilentProgress:
    """Reports nothing: ranks other than the first, and tests."""

    def update(self, done: int, total: int, unit: str, **values: Any) -> None:
        """Does nothing."""

    def note(self, text: str) -> None:
        """Does nothing."""


class ProgressFile:
    """Appends events to a file; at most ten updates a second, the last one always.

    Args:
        path: File of JSON lines, created if it is not there.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("a", encoding="utf-8", buffering=1)
        self._last = 0.0

    def update(self, done: int, total: int, unit: str, **values: Any) -> None:
        """See `Progress.update`."""
        now = time.monotonic()
        if done < total and now - self._last < 0.1:
            return
        self._last = now
        self._write(event="update", done=done, total=total, unit=unit, values=values)

    def note(self, text: str) -> None:
        """See `Progress.note`."""
        self._write(event="note", text=text)

    def error(self, error: NemoSpinError) -> None:
        """Hands a user's mistake to the command that prints it."""
        self._write(event="error", type=type(error).__name__, message=str(error))

    def _write(self, **event: Any) -> None:
        self._stream.write(json.dumps(event) + "\n")
