"""Waits for a stage's processes while showing what they report."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_spin.data.progress import Progress
from nemo_spin.errors import PREEMPTED, NemoSpinError, PreemptedError, StageError, error_from_name, explain
from nemo_spin.selfplay.launcher import RunningJob
from nemo_spin.selfplay.signals import undisturbed
from nemo_spin.selfplay.watchdog import Watchdog

_POLL_S = 0.1
_GRACE_S = 15.0  # for the other ranks to end after one reported an error
_TOLD_TO_LEAVE = (PREEMPTED, 128 + signal.SIGTERM, 128 + signal.SIGUSR1)  # the last two: nothing to save yet


class ProgressReader:
    """Reads the events that were appended to a progress file since the last look.

    Args:
        path: The file (`nemo_spin.data.progress`); it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""
        self._done: tuple[Any, ...] = ()
        self.advanced = time.monotonic()  # when more was done than before
        self.error: NemoSpinError | None = None

    def pump(self, progress: Progress) -> None:
        """Hands new updates and notes to `progress`; keeps the first error that was reported."""
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._offset)
                new = stream.read()
        except FileNotFoundError:
            return
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        events = [event for event in map(_parse, lines) if event is not None]
        for event in events:
            self._look_for_progress(event)
        for position, event in enumerate(events):
            self._handle(event, progress, is_last=position == len(events) - 1)

    def _look_for_progress(self, event: dict[str, Any]) -> None:
        """Values that change while no more is done are none."""
        if event.get("event") == "update":
            done = (event["done"], event["total"], event["unit"])
            if done != self._done:
                self._done, self.advanced = done, time.monotonic()

    def _handle(self, event: dict[str, Any], progress: Progress, *, is_last: bool) -> None:
        match event.get("event"):
            case "update" if is_last or event["done"] >= event["total"]:
                progress.update(event["done"], event["total"], event["unit"], **event["values"])
            case "note":
                progress.note(event["text"])
            case "error" if self.error is None:
                self.error = error_from_name(event["type"], event["message"])


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:  # a writer was killed in the middle of a line
        return None
    return event if isinstance(event, dict) else None


def follow(
    job: RunningJob,
    *,
    name: str,
    progress_path: Path,
    progress: Progress,
    timeout_s: float,
    interrupt: Callable[[], None] | None = None,
    grace_s: float = 0.0,
    watchdog: Watchdog | None = None,
) -> None:
    """Returns when the job has ended well; ends it in every other case.

    Args:
        job: The running processes.
        name: For messages, such as "train of iteration 0".
        progress_path: Where they report.
        progress: Gets what they report.
        timeout_s: Seconds without progress after which they are ended.
        interrupt: Asks the processes to save and end; None where they have nothing to save.
        grace_s: Seconds they have for it, when this command is told to stop.
        watchdog: Looks for ranks that hang; None: nobody does.

    Raises:
        PreemptedError: They were told to leave, and have saved what they had.
        NemoSpinError: They failed; with the typed error that they reported, if any.
    """
    reader = ProgressReader(progress_path)
    failed: float | None = None
    stopping = False
    try:
        while (code := job.poll()) is None:
            reader.pump(progress)
            now = time.monotonic()
            if reader.error is not None:
                failed = now if failed is None else failed
                if now - failed > _GRACE_S:
                    break
            elif now - reader.advanced > timeout_s:
                break
            if watchdog is not None and reader.error is None:
                watchdog.check()
            time.sleep(_POLL_S)
        reader.pump(progress)
    except SystemExit:
        stopping = True
        if interrupt is None:
            raise
        with undisturbed():
            progress.note(f"told to stop: {name} saves first, for {grace_s:g} s at most")
            interrupt()
            end = time.monotonic() + grace_s
            while (code := job.poll()) is None and time.monotonic() < end:
                time.sleep(_POLL_S)
            reader.pump(progress)
        if code != PREEMPTED:
            raise
    finally:
        with undisturbed(stopping=stopping):
            job.stop()
    if reader.error is not None:
        raise reader.error
    if code in _TOLD_TO_LEAVE:
        raise PreemptedError(f"{name} was told to leave; the same command goes on from what is saved")
    where = "" if watchdog is None else f" ({watchdog.phases()})"
    if code is None:
        raise StageError(
            explain(
                name,
                found=f"made no progress for {timeout_s:.0f} s, and was ended{where}\n"
                f"{job.describe_failure()}",
                rule="a stage has something new to report within launcher.timeout_s",
                remedy="look at its log; raise launcher.timeout_s if it only needs longer; "
                "the same command goes on where it was",
            )
        )
    if code != 0:
        raise StageError(
            explain(
                name,
                found=f"ended with exit code {code}{where}\n{job.describe_failure()}",
                rule="a stage's processes end with exit code 0",
                remedy="look at the log; the same command goes on where it was",
            )
        )
