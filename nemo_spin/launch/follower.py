"""The command of every rank but 0: does what rank 0's says (`external.py`)."""

from __future__ import annotations

import signal
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_spin.config.schema import Config
from nemo_spin.errors import StageError, explain
from nemo_spin.launch.local import LocalJob, Share
from nemo_spin.launch.placement import Placement
from nemo_spin.launch.wire import BEAT_S, HELLO_S, NAME, Door, Line
from nemo_spin.selfplay.launcher import Job


@dataclass
class _Duty:
    """What a follower does now.

    Attributes:
        order: Its number.
        job: Its rank of the job.
    """

    order: int = 0
    job: LocalJob | None = None
    told_to_leave: threading.Event = field(default_factory=threading.Event)


def follow_first_rank(config: Config, run_dir: Path, place: Placement) -> int:
    """Does what rank 0's command says, to its end; returns the exit code of that command.

    Raises:
        StageError: Rank 0 did not come, or is gone.
    """
    line = _connect(config, run_dir / NAME, place)
    duty = _Duty()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: duty.told_to_leave.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 gets it as well, and says what follows
    beat_s = min(BEAT_S, config.launcher.silence_timeout_s / 4)
    try:
        return _obey(line, duty, place=place, beat_s=beat_s)
    except OSError as error:
        raise StageError(
            explain(
                f"rank {place.rank} of launcher.name=external",
                found=f"rank 0 is gone ({error})",
                rule="rank 0 runs the command, and the others follow it",
                remedy="what happened is on the screen of rank 0; start the same command again in all ranks",
            )
        ) from error
    finally:
        if duty.job is not None:
            duty.job.stop()
        line.close()


def _read(line: Line, inbox: list[dict[str, Any]], ended: threading.Event) -> None:
    try:
        while True:
            inbox.append(line.receive())
    except OSError as error:
        inbox.append({"kind": "gone", "why": str(error)})
        ended.set()


def _obey(line: Line, duty: _Duty, *, place: Placement, beat_s: float) -> int:
    inbox: list[dict[str, Any]] = []
    ended = threading.Event()
    threading.Thread(target=_read, args=(line, inbox, ended), daemon=True).start()
    beat = 0.0
    while True:
        while inbox:
            message = inbox.pop(0)
            if message["kind"] == "bye":
                return int(message["code"])
            if message["kind"] == "gone":
                raise ConnectionError(message["why"])
            _do(message, duty, place)
        if duty.job is not None and (code := duty.job.poll()) is not None:
            age, text = duty.job.failure_age_s(), duty.job.describe_failure()
            duty.job = None
            line.send("ended", order=duty.order, code=code, age=age, text=text)
        if duty.told_to_leave.is_set():
            duty.told_to_leave.clear()
            line.send("leave")
        if time.monotonic() - beat > beat_s:
            beat = time.monotonic()
            line.send("beat")
        ended.wait(0.05)


def _do(message: dict[str, Any], duty: _Duty, place: Placement) -> None:
    match message["kind"]:
        case "start":
            given = message["job"]
            given |= {name: Path(given[name]) for name in ("log_dir", "progress_path")}
            job = Job(**{**given, "arguments": tuple(given["arguments"])})
            duty.order = int(message["order"])
            duty.job = LocalJob(job, Share((place,), message["address"], int(message["port"])))
        case "interrupt" if duty.job is not None:
            duty.job.interrupt()
        case "stop" if duty.job is not None:
            duty.job.stop()


def _connect(config: Config, path: Path, place: Placement) -> Line:
    """A line to rank 0's command, which may start later than this one."""
    launcher = config.launcher
    end = time.monotonic() + launcher.join_timeout_s
    problem = f"no {path}"
    while time.monotonic() < end:
        door = Door.read(path)
        if door is not None:
            try:
                connection = socket.create_connection((door.address, door.port), timeout=HELLO_S)
                line = Line(connection, launcher.silence_timeout_s)
                line.send("hello", rank=place.rank, host=socket.gethostname(), token=door.token)
                return line
            except OSError as error:  # of an earlier start, or not up yet
                problem = f"{door.address}:{door.port}: {error}"
        time.sleep(0.2)
    raise StageError(
        explain(
            f"rank {place.rank} of launcher.name=external",
            found=f"rank 0 could not be reached within {launcher.join_timeout_s:g} s ({problem})",
            rule="all ranks run the same command at the same time, on hosts that share the run directory",
            remedy="see that rank 0 was started, that run_dir is the same directory everywhere, and that "
            "its host can be reached; raise launcher.join_timeout_s where hosts are slow",
        )
    )
