"""The sampler's process as seen from the command that started it: log, watchdog, end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nemo_spin.errors import GenerationError, NemoSpinError, explain
from nemo_spin.generation import status
from nemo_spin.generation.lifeline import PARENT_VARIABLE

_MODULE = "nemo_spin.generation.worker"
_LOG_LINES = 12
_LOG_BYTES = 16 << 10
_END_TIMEOUT_S = 60.0  # everything is written by then
_GRACE_S = 5.0
_NOT_INHERITED = frozenset(
    {"PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__", "MASTER_ADDR", "MASTER_PORT"}
    | {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}
)


@dataclass(frozen=True)
class Timeouts:
    """Seconds a step may take; the configuration keys are for messages."""

    load_s: float
    shard_s: float

    def of(self, kind: str) -> tuple[float, str]:
        """The limit of a step, and the key that sets it."""
        match kind:
            case status.LOAD:
                return self.load_s, "generation.load_timeout_s"
            case status.SHARD:
                return self.shard_s, "generation.shard_timeout_s"
            case _:
                return _END_TIMEOUT_S, ""


class WorkerProcess:
    """A sampler's process in a group of its own, which ends when this process ends.

    It is a `RunningJob` of the loop, with one difference: `poll` raises the typed error
    where it failed. Start it from a thread that stays until it has ended.

    Args:
        python: The interpreter that has the engine.
        request_path: What it is asked to do.
        status_path: Where it says which step it is at.
        log_path: Its output is appended there.
        python_path: Its PYTHONPATH, in which it finds this package.
        timeouts: Seconds for loading and for each shard.
    """

    def __init__(
        self,
        *,
        python: str,
        request_path: Path,
        status_path: Path,
        log_path: Path,
        python_path: str,
        timeouts: Timeouts,
    ) -> None:
        self._log_path = log_path
        self._timeouts = timeouts
        self._ended = False
        status_path.unlink(missing_ok=True)
        self._status = status.StatusReader(status_path)
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            self._log_begin = log.tell()
            try:
                self._process = subprocess.Popen(
                    [python, "-P", "-m", _MODULE, str(request_path)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=_environment(python_path),
                    start_new_session=True,
                )
            except OSError as error:
                raise _not_started(python, error) from error
        self._step = self._status.step
        self._step_began = time.monotonic()

    @property
    def pid(self) -> int:
        """Of the process, and of its group."""
        return self._process.pid

    def poll(self) -> int | None:
        """None while it runs, 0 when all is done. It does not wait.

        Raises:
            NemoSpinError: It failed, or a step took too long; the process is ended.
        """
        code = self._process.poll()
        self._status.poll()
        if code is None:
            return self._watch()
        self._end_group()
        if code == 0:
            return 0
        raise self._failure(code)

    def stop(self) -> None:
        """Ends the whole process group, within seconds. Harmless when it has ended."""
        if self._process.poll() is None:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_S)
        self._end_group()

    def describe_failure(self) -> str:
        """The last lines of its log, and the log's path."""
        return f"{self._last_lines()}\n  log:    {self._log_path}"

    def _watch(self) -> int | None:
        now = time.monotonic()
        if self._status.step != self._step:
            self._step, self._step_began = self._status.step, now
        limit_s, key = self._timeouts.of(self._step.kind)
        if now - self._step_began <= limit_s:
            return None
        self._end_group()
        if self._step.kind == status.END:
            return 0
        what = "loading" if self._step.kind == status.LOAD else "answering"
        raise GenerationError(
            explain(
                f"generation: {what} {self._step.name}",
                found=f"not done after {limit_s:g} s; the sampler was ended\n{self.describe_failure()}",
                rule=f"it takes {key} at most",
                remedy=f"look at the log; raise {key} if it only needs longer; "
                "the same command goes on where it was",
            )
        )

    def _failure(self, code: int) -> NemoSpinError:
        if self._status.error is not None:
            error = self._status.error
            if isinstance(error, GenerationError):  # the engine's: its log says more
                return GenerationError(f"{error}\n{self.describe_failure()}")
            return error
        step = self._status.step
        how = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        return GenerationError(
            explain(
                f"generation: the sampler's process (at {step.kind} {step.name})",
                found=f"{how} without saying why\n{self.describe_failure()}",
                rule="it answers all prompts and ends with exit code 0",
                remedy="look at the log; signal 9 often means that memory ran out; "
                "the same command goes on where it was",
            )
        )

    def _last_lines(self) -> str:
        try:
            with self._log_path.open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_begin, end - _LOG_BYTES))
                lines = log.read().decode("utf-8", errors="replace").splitlines()
        except OSError:
            return "  (no log)"
        shown = [f"  | {line[:300]}" for line in lines if line.strip()][-_LOG_LINES:]
        return "\n".join(shown) or "  (an empty log)"

    def _end_group(self) -> None:
        if self._ended:  # by now the number may be another group's
            return
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._ended = True

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


class NothingToDo:
    """A job that was done before it began."""

    def poll(self) -> int | None:
        """Done."""
        return 0

    def stop(self) -> None:
        """Nothing runs."""

    def describe_failure(self) -> str:
        """There is none."""
        return ""


RunningGeneration = WorkerProcess | NothingToDo


def wait(job: RunningGeneration, *, poll_s: float = 0.1, on_poll: Callable[[], None] | None = None) -> None:
    """Returns when the job is done; ends it in every other case.

    Args:
        job: The running process.
        poll_s: Seconds between looks at it.
        on_poll: Called at each.

    Raises:
        NemoSpinError: It failed.
    """
    try:
        while job.poll() is None:
            if on_poll is not None:
                on_poll()
            time.sleep(poll_s)
    finally:
        job.stop()


def _environment(python_path: str) -> dict[str, str]:
    """Ours, without what tells our interpreter and our ranks where they belong."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _NOT_INHERITED and not name.startswith("TORCHELASTIC_")
    }
    return {
        **environment,
        "PYTHONPATH": python_path,
        "PYTHONUNBUFFERED": "1",
        PARENT_VARIABLE: str(os.getpid()),
    }


def _not_started(python: str, error: OSError) -> GenerationError:
    return GenerationError(
        explain(
            f"generation.python: {python}",
            found=f"could not be started ({error.strerror or error})",
            rule="the interpreter of an environment with vLLM",
            remedy="check generation.python, or make the environment again",
        )
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
