"""Which step the sampler's process is at: written by it, read by the watchdog beside it.

A file of JSON lines, so that it works wherever the process runs. The reader takes the
time between lines on its own clock; the clocks of two machines are never compared.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from nemo_spin.errors import NemoSpinError, error_from_name

LOAD = "load"
SHARD = "shard"
END = "end"


class StatusWriter:
    """Appends what the process begins.

    Args:
        path: The file; it exists from now on.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("a", encoding="utf-8", buffering=1)

    def step(self, kind: str, name: str) -> None:
        """A step begins, the one before is done.

        Args:
            kind: `LOAD`, `SHARD` or `END`.
            name: For messages.
        """
        self._write(kind=kind, name=name)

    def error(self, error: NemoSpinError) -> None:
        """The process cannot go on."""
        self._write(error=type(error).__name__, message=str(error))

    def _write(self, **event: str) -> None:
        self._stream.write(json.dumps(event) + "\n")


@dataclass(frozen=True)
class Step:
    """What the process is doing.

    Attributes:
        kind: `LOAD`, `SHARD` or `END`.
        name: For messages.
        number: Counts the steps, from 0.
    """

    kind: str
    name: str
    number: int


class StatusReader:
    """Follows a status file.

    Args:
        path: The file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""
        self.step = Step(LOAD, "starting", 0)
        self.error: NemoSpinError | None = None

    def poll(self) -> None:
        """Reads what was appended since the last time."""
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._offset)
                new = stream.read()
        except FileNotFoundError:
            return
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            event = json.loads(line)
            if "error" in event:
                self.error = error_from_name(event["error"], event["message"])
            else:
                self.step = Step(event["kind"], event["name"], self.step.number + 1)
