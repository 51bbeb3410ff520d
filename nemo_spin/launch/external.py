"""Ranks that someone else starts: torchrun, mpirun, srun or nemo-run, on any number of hosts.

Each of them runs the same `nemo-spin` command. The one of rank 0 is the command; the others
follow it: they start their rank of every stage when they are told to (a process of its own, so
that a stage's memory and process groups end with it), say how it ended, and end with the command.

| it happens | within | what is done |
|---|---|---|
| a host does not come | `launcher.join_timeout_s` | the command ends, naming the missing ranks |
| a rank fails | seconds | the others are ended, the first failure is shown |
| a host disappears | its connection breaks, or `launcher.silence_timeout_s` | the same, naming its ranks |
| rank 0 disappears | the same | the followers end their ranks, and themselves |

Clocks of hosts are never compared: a follower says how long ago its rank failed.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_spin.config.schema import Config
from nemo_spin.errors import PREEMPTED, ConfigError, StageError, explain
from nemo_spin.launch.local import LocalJob, Share, not_started
from nemo_spin.launch.meeting import own_address, reserve_port
from nemo_spin.launch.placement import Placement, of_environment
from nemo_spin.launch.wire import BEAT_S, HELLO_S, NAME, Door, Line
from nemo_spin.selfplay.launcher import Job, RankJob

_GRACE_S = 1.0  # for ranks that fail together to say why
_SAVED_S = 5.0  # having saved, ranks end one by one
_GONE = 1  # exit code of a job whose rank's host disappeared


@dataclass
class _Follower:
    """A rank's command elsewhere.

    Attributes:
        line: To it.
        host: Its name.
        gone: Why it is gone; None: it is there.
    """

    line: Line
    host: str
    gone: str | None = None


@dataclass(frozen=True)
class _End:
    """How a rank ended: exit code, when on this host's monotonic clock, and what is to be said."""

    code: int
    time: float
    text: str


class ExternalLauncher:
    """What the command on rank 0 gives orders to.

    Args:
        config: The configuration.
        run_dir: Shared by all hosts.
        environment: Of this process.

    Raises:
        ConfigError: The ranks that were started are not those of the configuration.
    """

    def __init__(self, config: Config, run_dir: Path, environment: Mapping[str, str] = os.environ) -> None:
        self._config = config
        self.place = checked_place(config, environment)
        self.address = environment.get("MASTER_ADDR") or own_address(environment)
        self._door_path = run_dir / NAME
        self._server = socket.create_server(
            ("", 0), family=socket.AF_INET6 if ":" in self.address else socket.AF_INET, backlog=1024
        )
        self._door = Door.of(self.address, int(self._server.getsockname()[1]))
        run_dir.mkdir(parents=True, exist_ok=True)
        self._door.write(self._door_path)
        self._changed = threading.Condition()
        self.followers: dict[int, _Follower] = {}
        self.ends: dict[tuple[int, int], _End] = {}  # by order and rank
        self._orders = 0
        self._closed = threading.Event()
        threading.Thread(target=self._accept, name="followers", daemon=True).start()
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def start(self, job: Job) -> RankJob:
        """Waits for all ranks to be there, and starts the job in all of them.

        Raises:
            StageError: Ranks are missing.
            DataError: A process or log file could not be made.
        """
        self.await_all()
        self._orders += 1
        try:
            return ExternalJob(self, job, self._orders)
        except OSError as error:
            raise not_started(job, error) from error

    def close(self, code: int) -> None:
        """Tells the followers that the command ends with `code`."""
        self._closed.set()
        self.tell("bye", code=code)
        if Door.read(self._door_path) == self._door:
            self._door_path.unlink(missing_ok=True)
        self._server.close()
        for follower in list(self.followers.values()):
            follower.line.close()

    def tell(self, kind: str, **values: Any) -> None:
        """Sends a message to every follower that is there."""
        for rank, follower in list(self.followers.items()):
            if follower.gone is None:
                try:
                    follower.line.send(kind, **values)
                except OSError as error:
                    self._lose(rank, str(error))

    def gone(self) -> dict[int, str]:
        """Ranks that were there and are not any more: host and reason."""
        return {
            rank: f"{follower.host}: {follower.gone}"
            for rank, follower in sorted(self.followers.items())
            if follower.gone is not None
        }

    def await_all(self) -> None:
        """Waits until every rank's command is there.

        Raises:
            StageError: Ranks are missing, or gone.
        """
        wanted = self.place.world_size - 1
        with self._changed:
            self._changed.wait_for(
                lambda: len(self.followers) == wanted or self.gone(), self._config.launcher.join_timeout_s
            )
        missing = sorted(set(range(1, wanted + 1)) - set(self.followers))
        if gone := self.gone():
            found = "; ".join(f"rank {rank} on {why}" for rank, why in gone.items())
        elif missing:
            seconds = self._config.launcher.join_timeout_s
            found = f"rank{'s' * (len(missing) > 1)} {_listed(missing)} did not come within {seconds:g} s"
        else:
            return
        raise StageError(
            explain(
                f"the ranks of launcher.name=external, at {self.address}",
                found=found,
                rule=f"all {wanted + 1} ranks run the same command at the same time, on hosts that share "
                "the run directory and reach rank 0's",
                remedy="look at what the missing ranks printed; raise launcher.join_timeout_s where hosts "
                "are slow; start the same command again",
            )
        )

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:  # the command has ended
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        """Reads what one follower says, to its end."""
        line = Line(connection, HELLO_S)
        try:
            hello = line.receive()
        except OSError:
            line.close()
            return
        rank = hello.get("rank")
        if (
            not self._door.opens_for(hello.get("token"))
            or not isinstance(rank, int)
            or not 0 < rank < self.place.world_size
            or rank in self.followers
        ):
            line.close()
            return
        line.expect_within(self._config.launcher.silence_timeout_s)
        with self._changed:
            self.followers[rank] = _Follower(line, str(hello.get("host")))
            self._changed.notify_all()
        try:
            while True:
                self._handle(rank, line.receive())
        except OSError as error:
            self._lose(rank, str(error))

    def _handle(self, rank: int, message: dict[str, Any]) -> None:
        match message["kind"]:
            case "ended":
                end = _End(int(message["code"]), time.monotonic() - float(message["age"]), message["text"])
                with self._changed:
                    self.ends[int(message["order"]), rank] = end
                    self._changed.notify_all()
            case "leave":  # its host is asked for: as if this one had been
                os.kill(os.getpid(), signal.SIGTERM)

    def _lose(self, rank: int, why: str) -> None:
        with self._changed:
            if self.followers[rank].gone is None and not self._closed.is_set():
                self.followers[rank].gone = why
                self._changed.notify_all()

    def _beat(self) -> None:
        while not self._closed.wait(min(BEAT_S, self._config.launcher.silence_timeout_s / 4)):
            self.tell("beat")


class ExternalJob:
    """A job in all ranks. See `nemo_spin.selfplay.launcher.RankJob`."""

    def __init__(self, launcher: ExternalLauncher, job: Job, order: int) -> None:
        self._launcher = launcher
        self._job = job
        self._order = order
        self._failed_at: float | None = None
        self._ending = self._was_stopped = False
        self._port = reserve_port(launcher.address)
        port = int(self._port.getsockname()[1])
        self._mine = LocalJob(job, Share((launcher.place,), launcher.address, port))
        told = asdict(job) | {"log_dir": str(job.log_dir), "progress_path": str(job.progress_path)}
        launcher.tell("start", order=order, job=told, address=launcher.address, port=port)

    def poll(self) -> int | None:
        """The exit code once all ranks ended: 0, or that of the rank that failed first."""
        self._note_mine()
        failed = [end for end in self._ends().values() if end.code]
        if (failed or self._launcher.gone()) and not self._ending:
            now = time.monotonic()
            self._failed_at = self._failed_at or now
            saved = bool(failed) and all(end.code == PREEMPTED for end in failed)
            if now - self._failed_at > (_SAVED_S if saved else _GRACE_S):
                self._end()
        if len(self._ends().keys() | self._launcher.gone().keys()) < self._job.ranks:
            return None
        self._port.close()
        first = self._first()
        if first is None:
            return 0
        return 128 + signal.SIGTERM if self._was_stopped and first[1].code > 128 else first[1].code

    def interrupt(self) -> None:
        """Asks every rank to save and to end with `PREEMPTED`."""
        self._launcher.tell("interrupt", order=self._order)
        self._mine.interrupt()

    def stop(self) -> None:
        """Ends all ranks; returns when those of this host are gone and the others are told."""
        if self.poll() is None:
            self._was_stopped = True
            self._end()
            self._note_mine()
        self._mine.stop()
        self._port.close()

    def describe_failure(self) -> str:
        """What happened to the rank that failed first, the end of its log, and the log's path."""
        first = self._first()
        if first is None:
            return f"{self._job.name}: no rank failed"
        return first[1].text

    def _end(self) -> None:
        self._ending = True
        self._launcher.tell("stop", order=self._order)
        self._mine.stop()

    def _note_mine(self) -> None:
        key = (self._order, 0)
        code = self._mine.poll()
        if code is not None and key not in self._launcher.ends:
            failed_at = time.monotonic() - self._mine.failure_age_s()
            self._launcher.ends[key] = _End(code, failed_at, self._mine.describe_failure())

    def _ends(self) -> dict[int, _End]:
        return {rank: end for (order, rank), end in list(self._launcher.ends.items()) if order == self._order}

    def _first(self) -> tuple[int, _End] | None:
        """The rank that failed first; one whose host is gone comes before those that miss it."""
        for rank, why in self._launcher.gone().items():
            if rank not in self._ends():
                others = [str(other) for other in self._launcher.gone() if other != rank]
                also = f" (ranks {', '.join(others)} are gone, too)" if others else ""
                text = f"{self._job.name}: rank {rank} is gone with its host {why}{also}"
                return rank, _End(_GONE, 0.0, text)
        failed = [(rank, end) for rank, end in self._ends().items() if end.code]
        return min(failed, key=lambda entry: entry[1].time, default=None)


def checked_place(config: Config, environment: Mapping[str, str]) -> Placement:
    """This process's place among the ranks that the configuration wants.

    Raises:
        ConfigError: Others were started.
    """
    place = of_environment(environment)
    wanted = config.trainer.devices * config.trainer.num_nodes
    if place.world_size == wanted:
        return place
    raise ConfigError(
        explain(
            "trainer.devices x trainer.num_nodes",
            found=f"{config.trainer.devices} x {config.trainer.num_nodes}, and {place.world_size} ranks "
            "were started",
            rule="whoever starts the ranks starts as many as the configuration has",
            remedy=f"start {wanted}, or change trainer.devices and trainer.num_nodes",
        )
    )


def _listed(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:20]))
    return f"{shown} and {len(ranks) - 20} more" if len(ranks) > 20 else shown
