"""Ranks as processes of this machine.

The ranks get the variables that torchrun would give them, but no agent of torchrun's:
that would be one more process that imports torch before the first rank starts, and one
more that a SIGKILL can cut off from its ranks. What is needed of it is little:

- one process group for all ranks, and a guard in it that kills the group when the
  launching process dies, so that children of ranks (checkpoint writers) end too; besides,
  each rank asks the kernel to be killed with its launcher (`launch/rank.py`);
- the first failing rank ends the others within seconds.

A job must be started from a thread that lives as long as the job: to the kernel, the
thread is the parent.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import nemo_spin
from nemo_spin.errors import PREEMPTED, DataError, explain
from nemo_spin.launch.log_tail import quoted_end
from nemo_spin.launch.meeting import reserve_port
from nemo_spin.launch.placement import Placement
from nemo_spin.launch.rank import ALONE_VARIABLE, FAILURE_VARIABLE, LAUNCHER_VARIABLE
from nemo_spin.selfplay.launcher import Job, RankJob

PROGRESS_VARIABLE = "NEMO_SPIN_PROGRESS"
_GRACE_S = 1.0  # for ranks that fail together to say why
_TERM_S = 5.0  # from SIGTERM to SIGKILL
_GUARD = 'trap "" TERM INT HUP USR1; read _; kill -KILL 0'  # its input ends when the launching process does


@dataclass(frozen=True)
class _End:
    """How a rank ended: Popen's return code and when (seconds since the epoch)."""

    code: int
    time: float


class LocalLauncher:
    """Starts all ranks of a job on this machine."""

    def start(self, job: Job) -> RankJob:
        """Starts the ranks and returns at once.

        Raises:
            DataError: A process or log file could not be made.
        """
        try:
            return LocalJob(job)
        except OSError as error:
            raise not_started(job, error) from error


@dataclass(frozen=True)
class Share:
    """The ranks of a job that this process starts, where there are others elsewhere.

    Attributes:
        places: Of these ranks.
        address: Where rank 0 is found.
        port: The same.
    """

    places: tuple[Placement, ...]
    address: str
    port: int


def not_started(job: Job, error: OSError) -> DataError:
    """The error for a job whose processes or log files could not be made."""
    return DataError(
        explain(
            f"{job.name}, logs in {job.log_dir}",
            found=f"could not be started ({error})",
            rule="the run directory must be writable and have room, the machine room for processes",
            remedy="free what is missing and start the same command again",
        )
    )


class LocalJob:
    """The processes of one job. See `nemo_spin.selfplay.launcher.RankJob`.

    Args:
        job: It.
        share: Which of its ranks are started; None: all.
    """

    def __init__(self, job: Job, share: Share | None = None) -> None:
        self._job = job
        self._port = None
        if share is None:
            everywhere = range(job.ranks)
            self._port = reserve_port("127.0.0.1")
            places = tuple(Placement(rank, job.ranks, rank, job.ranks) for rank in everywhere)
            share = Share(places, "127.0.0.1", int(self._port.getsockname()[1]))
        self._share = share
        self._ends: dict[int, _End] = {}
        self._changed = threading.Condition()
        self._was_stopped = False
        self._ranks: list[subprocess.Popen[bytes]] = []
        job.log_dir.mkdir(parents=True, exist_ok=True)
        stem = re.sub(r"[^\w.-]+", "-", job.name)
        self._logs = [job.log_dir / f"{stem}.rank_{place.rank}.log" for place in share.places]
        self._offsets = [log.stat().st_size if log.exists() else 0 for log in self._logs]
        self._failures = [log.with_suffix(".failure.json") for log in self._logs]
        self._guard = _start_guard(group=0)
        self._later_guards: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(len(share.places)):
                self._ranks.append(self._start_rank(rank))
        except BaseException:
            self._sweep()
            for process in self._ranks:
                process.wait()
            raise
        for rank in range(len(share.places)):
            threading.Thread(target=self._await_rank, args=(rank,), daemon=True).start()

    def poll(self) -> int | None:
        """The exit code once all ranks ended: 0, or that of the rank that failed first."""
        if not self._all_ended():
            self._renew_guard()
            return None
        self._sweep()
        first = self._first_failure()
        if first is None:
            return 0
        if self._was_stopped and self._ends[first].code < 0:
            return 128 + signal.SIGTERM
        code = self._ends[first].code
        return code if code > 0 else 128 - code

    def interrupt(self) -> None:
        """Asks every rank, and none of its children, to save and to end with `PREEMPTED`."""
        with self._changed:
            running = [process for rank, process in enumerate(self._ranks) if rank not in self._ends]
        for process in running:
            process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """Ends all ranks and their children; returns when they are gone."""
        if not self._all_ended():
            self._was_stopped = True
            self._end_group()
        self._sweep()

    def failure_age_s(self) -> float:
        """Seconds since the rank that failed first did; 0 where none has."""
        first = self._first_failure()
        return 0.0 if first is None else max(0.0, time.time() - self._failure_time(first))

    def describe_failure(self) -> str:
        """What happened to the rank that failed first, the end of its log, and the log's path."""
        first = self._first_failure()
        if first is None:
            return f"{self._job.name}: no rank failed"
        what = self._how_it_ended(first)
        tail = quoted_end(self._logs[first], self._offsets[first], aborted=what.endswith(signal.SIGABRT.name))
        rank = self._share.places[first].rank
        return f"{self._job.name}: rank {rank} {what}\n{tail}  log: {self._logs[first]}"

    def _start_rank(self, rank: int) -> subprocess.Popen[bytes]:
        self._failures[rank].unlink(missing_ok=True)
        command = [sys.executable, "-m", "nemo_spin.launch.rank", self._job.module, *self._job.arguments]
        with self._logs[rank].open("ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(rank),
                process_group=self._guard.pid,
            )

    def _environment(self, rank: int) -> dict[str, str]:
        inherited = inherited_environment()
        place = self._share.places[rank]
        if (
            self._port is not None and sys.platform == "linux"
        ):  # not the address of the host name, which containers often lack
            inherited.setdefault("GLOO_SOCKET_IFNAME", "lo")
        inherited.pop("GROUP_RANK", None)  # of torchrun's
        if self._port is None:  # Slurm sends it to every process of a task
            inherited[ALONE_VARIABLE] = "1"
        return inherited | {
            **place.variables(),
            "MASTER_ADDR": self._share.address,
            "MASTER_PORT": str(self._share.port),
            "OMP_NUM_THREADS": str(self._job.omp_num_threads),
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
            PROGRESS_VARIABLE: str(self._job.progress_path),
            FAILURE_VARIABLE: str(self._failures[rank]),
            LAUNCHER_VARIABLE: str(os.getpid()),
        }

    def _await_rank(self, rank: int) -> None:
        """Notes the end of a rank; a failure ends the others (runs in a thread of its own)."""
        code = self._ranks[rank].wait()
        with self._changed:
            self._ends[rank] = _End(code, time.time())
            self._changed.notify_all()
        within_s = _TERM_S if code == PREEMPTED else _GRACE_S  # having saved, ranks end one by one
        if code != 0 and not self._all_ended(within_s=within_s):
            self._end_group()

    def _all_ended(self, within_s: float = 0.0) -> bool:
        """Whether all ranks ended, now or `within_s` seconds from now."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._ends) == len(self._ranks), within_s)

    def _end_group(self) -> None:
        """SIGTERM, and SIGKILL to what is still there after a while."""
        self._signal_group(signal.SIGTERM)
        if not self._all_ended(within_s=_TERM_S):
            self._signal_group(signal.SIGKILL)
            self._all_ended(within_s=_TERM_S)

    def _signal_group(self, number: signal.Signals) -> None:
        with self._changed:
            if self._guard.returncode is None:  # not reaped: the group's number is still ours
                os.killpg(self._guard.pid, number)

    def _renew_guard(self) -> None:
        """Starts another guard where somebody killed it; the first, not reaped, keeps the group's number."""
        last = [self._guard, *self._later_guards][-1]
        with self._changed:
            if self._guard.returncode is None and _has_ended(last):
                self._later_guards.append(_start_guard(group=self._guard.pid))

    def _sweep(self) -> None:
        """Ends the guard, and whatever children the ranks left behind."""
        with self._changed:
            self._signal_group(signal.SIGKILL)
            for guard in (*self._later_guards, self._guard):
                guard.wait()
                _close(guard.stdin)
            if self._port is not None:
                self._port.close()
            for failure in (
                self._failures if self._ends and not any(e.code for e in self._ends.values()) else ()
            ):
                failure.unlink(missing_ok=True)

    def _failure_time(self, rank: int) -> float:
        """When the rank failed: by its own note, else when its process ended."""
        note = read_note(self._failures[rank])
        return float(note.get("time", self._ends[rank].time))

    def _first_failure(self) -> int | None:
        with self._changed:
            failed = [rank for rank, end in self._ends.items() if end.code != 0]
        return min(failed, key=self._failure_time, default=None)

    def _how_it_ended(self, rank: int) -> str:
        code = self._ends[rank].code
        note = read_note(self._failures[rank])
        reason = f" ({note['type']}: {note['message']})" if note and note["type"] != "SystemExit" else ""
        if code < 0 and reason:  # what ended it then, such as a library that is taken apart, is no cause
            return f"failed{reason}"
        if code == -signal.SIGKILL and not self._was_stopped:
            return "was killed by SIGKILL (often: the machine ran out of memory)"
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"ended with exit code {code}{reason}"


def _start_guard(group: int) -> subprocess.Popen[bytes]:
    """A process that kills its group when this process ends; `group` 0: a new one."""
    return subprocess.Popen(
        ["/bin/sh", "-c", _GUARD],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=group,
    )


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a child has ended, without taking its end from whoever waits for it."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def inherited_environment() -> dict[str, str]:
    """This process's environment, in which ranks find this package and nothing of torchrun's agent.

    What CUDA is to be told before it starts is added where it is not there: rows of many lengths leave
    holes in memory unless its segments can grow, and Megatron orders what it sends by the one queue.
    """
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC_")}
    paths = [str(Path(nemo_spin.__file__).resolve().parents[1])]
    if "site-packages" in paths[0]:  # installed: found without help
        paths = []
    if inherited.get("PYTHONPATH"):
        paths.append(inherited["PYTHONPATH"])
    if paths:
        inherited["PYTHONPATH"] = os.pathsep.join(paths)
    return {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        **inherited,
    }


def read_note(path: Path) -> dict[str, Any]:
    """What a rank noted about its failure; empty where it did not."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _close(stream: IO[bytes] | None) -> None:
    if stream is not None:
        stream.close()
