"""state.json: what a run is doing and how long everything took.

It is for people and for `nemo-spin status`. Whether a stage is done is decided by its
manifest alone, so nothing is lost when this file is.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemo_spin.data.files import write_json
from nemo_spin.errors import NemoSpinError
from nemo_spin.selfplay.lock import Owner

RUNNING, DONE, FAILED, INTERRUPTED, IDLE = "running", "done", "failed", "interrupted", "idle"
STOPPED = "stopped"  # by a guard


@dataclass
class StageState:
    """One stage of one iteration.

    Attributes:
        status: running | done | failed | interrupted.
        attempts: How often it was started.
        started_at: Unix time of the last start.
        seconds: How long the last attempt took; None while it runs.
        earlier_seconds: What earlier attempts that did not finish took, as far as known.
    """

    status: str
    attempts: int = 0
    started_at: float = 0.0
    seconds: float | None = None
    earlier_seconds: float = 0.0


@dataclass
class State:
    """The whole file.

    Attributes:
        status: Of the run: running | done | failed | interrupted | idle (a command that
            runs one stage has done so).
        iteration: Iteration of the current (or last) stage; None before the first.
        stage: Name of the current (or last) stage.
        owner: The process that runs (or ran) it.
        error: First line of what stopped it.
        fruitless: Starts in a row that ended by what may pass, and brought nothing.
        fruitless_since: Unix time at which the first of them ended.
        stages: `StageState` by key, such as `prepare` or `iter_00/train`.
    """

    status: str = IDLE
    iteration: int | None = None
    stage: str | None = None
    owner: Owner | None = None
    error: str | None = None
    fruitless: int = 0
    fruitless_since: float = 0.0
    updated_at: float = 0.0
    stages: dict[str, StageState] = field(default_factory=dict)

    def current(self) -> StageState | None:
        """The stage that `stage` and `iteration` name."""
        return self.stages.get(stage_key(self.stage, self.iteration)) if self.stage else None


def stage_key(stage: str, iteration: int | None) -> str:
    """The key of a stage in `State.stages`."""
    return stage if iteration is None else f"iter_{iteration:02d}/{stage}"


def read_state(path: Path) -> State | None:
    """The state at `path`; None where there is none that can be read."""
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        raw["owner"] = Owner(**raw["owner"]) if raw.get("owner") else None
        raw["stages"] = {key: StageState(**value) for key, value in raw["stages"].items()}
        return State(**raw)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


class StateFile:
    """Keeps state.json up to date; every change replaces the file atomically.

    Args:
        path: state.json. What an earlier command left there is taken over.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.state = read_state(path) or State()
        interrupted = self.state.current()
        if interrupted and interrupted.status == RUNNING:  # killed without a chance to say so
            interrupted.status = INTERRUPTED
            interrupted.seconds = max(0.0, self.state.updated_at - interrupted.started_at)
        self.state.owner = Owner.of_this_process()
        self.state.error = None

    def started(self, stage: str, iteration: int | None) -> None:
        """A stage begins."""
        key = stage_key(stage, iteration)
        entry = self.state.stages.setdefault(key, StageState(status=RUNNING))
        if entry.attempts and entry.status != DONE:
            entry.earlier_seconds += entry.seconds or 0.0
        entry.status, entry.seconds, entry.started_at = RUNNING, None, time.time()
        entry.attempts += 1
        self.state.status, self.state.stage, self.state.iteration = RUNNING, stage, iteration
        self._write()

    def alive(self) -> None:
        """The current stage still runs; called now and then."""
        with contextlib.suppress(NemoSpinError):  # a full disk: the stage itself will say so
            self._write()

    def ended(self, status: str, error: str | None = None) -> None:
        """The current stage ended.

        Args:
            status: done | failed | interrupted; all but `done` end the run.
            error: What stopped it.
        """
        entry = self.state.current()
        assert entry is not None, "a stage ended that was never started"
        entry.status, entry.seconds = status, time.time() - entry.started_at
        if status != DONE:
            self.state.status = status
            self.state.error = error.splitlines()[0] if error else None
            with contextlib.suppress(NemoSpinError):  # it must not hide what stopped the stage
                self._write()
            return
        self.advanced()
        self._write()

    def advanced(self) -> None:
        """There is more than before: a stage, a checkpoint, a shard."""
        self.state.fruitless = 0

    def came_to_nothing(self, *, starts: int, within_s: float) -> bool:
        """This start ended by what may pass; returns whether there should be another.

        Args:
            starts: So many in a row that brought nothing are enough,
            within_s: if they took as many seconds; both, as some fail at once, and some wait in a queue.

        Raises:
            DataError: It cannot be written down.
        """
        now = time.time()
        if self.state.fruitless == 0:
            self.state.fruitless_since = now
        self.state.fruitless += 1
        again = self.state.fruitless < starts or now - self.state.fruitless_since < within_s
        if not again:
            self.state.fruitless = 0  # the next is a person's, who has looked at it
        self._write()
        return again

    def found_done(self, stage: str, iteration: int | None) -> None:
        """A stage's work is complete, though its process was killed before it could say so."""
        entry = self.state.stages.get(stage_key(stage, iteration))
        if entry is not None and entry.status != DONE:
            entry.status = DONE
            self._write()

    def stopped(self, error: str) -> None:
        """A guard ended the run between two stages."""
        self.state.status, self.state.error = STOPPED, error.splitlines()[0]
        self._write()

    def finished(self) -> None:
        """Every stage of the run is done."""
        self.state.status = DONE
        self._write()

    def left(self) -> None:
        """The command has done what it was asked for."""
        if self.state.status == RUNNING:
            self.state.status = IDLE
            self._write()

    def _write(self) -> None:
        self.state.updated_at = time.time()
        write_json(self._path, asdict(self.state))
