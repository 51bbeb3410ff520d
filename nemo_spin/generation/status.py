"""Which step the sampler's process is at: written by it, read by the watchdog beside it.

A file of JSON lines, so that it works wherever the process runs. The reader takes the
time between lines on its own clock; the clocks of two machines are never compared.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_spin.errors import NemoSpinError, error_from_name

LOAD = "load"
REFRESH = "refresh"
CANARY = "canary"
SHARD = "shard"
WAIT = "wait"
DONE = "done"


STARTED, REFRESHED, ADAPTED, KEPT = "started", "refreshed", "adapted", "kept"


@dataclass(frozen=True)
class Opened:
    """How a request came to an engine.

    Attributes:
        way: `STARTED`, `REFRESHED` (a living one got new weights), `ADAPTED` (another adapter) or
            `KEPT` (it had them).
        seconds: How long it took; for `STARTED` without the start of the process.
        device: See `Engine.device`.
        can_refresh: See `Engine.can_refresh`.
        canary_texts: How many texts were compared with Megatron's numbers; 0: none.
        canary_difference: Mean absolute difference, nats per token.
    """

    way: str
    seconds: float
    device: str
    can_refresh: bool
    canary_texts: int = 0
    canary_difference: float | None = None


@dataclass
class Share:
    """What one of several samplers has answered.

    Attributes:
        in_shard: Answers of the shard it is at.
        answers: Answers of the shards it has published.
        tokens: Tokens of those.
    """

    in_shard: int = 0
    answers: int = 0
    tokens: int = 0


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
            kind: `LOAD`, `REFRESH`, `CANARY`, `SHARD`, `WAIT` (other samplers are at what is left)
                or `DONE` (all is answered; the process waits for another request, or for its end).
            name: For messages.
        """
        self._write(kind=kind, name=name)

    def opened(self, opened: Opened) -> None:
        """The engine is ready."""
        self._write(opened=asdict(opened))

    def share(self, share: Share) -> None:
        """How much it has answered."""
        self._write(share=asdict(share))

    def error(self, error: NemoSpinError) -> None:
        """The process cannot go on."""
        self._write(error=type(error).__name__, message=str(error))

    def _write(self, **event: Any) -> None:
        self._stream.write(json.dumps(event) + "\n")


@dataclass(frozen=True)
class Step:
    """What the process is doing.

    Attributes:
        kind: See `StatusWriter.step`.
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
        self.opened: Opened | None = None
        self.share = Share()

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
            elif "opened" in event:
                self.opened = Opened(**event["opened"])
            elif "share" in event:
                self.share = Share(**event["share"])
            else:
                self.step = Step(event["kind"], event["name"], self.step.number + 1)
