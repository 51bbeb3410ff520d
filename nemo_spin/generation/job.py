"""One request to the sampler, followed: watchdog, failures, and a new engine where a kept one fails."""

from __future__ import annotations

import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_spin.data.progress import Progress
from nemo_spin.errors import GateError, GenerationError, NemoSpinError, explain
from nemo_spin.generation import status
from nemo_spin.generation.keeper import NEVER, EngineKeeper
from nemo_spin.generation.leases import forget
from nemo_spin.generation.placement import HERE, Placement
from nemo_spin.generation.process import Interpreter, SamplerProcess
from nemo_spin.generation.request import GenerationRequest

_LOG_LINES = 12
_LOG_BYTES = 16 << 10
_END_TIMEOUT_S = 60.0  # everything is written by then


@dataclass(frozen=True)
class Timeouts:
    """Seconds a step may take; the configuration keys are for messages."""

    load_s: float
    shard_s: float

    def of(self, kind: str) -> tuple[float, str]:
        """The limit of a step, and the key that sets it."""
        match kind:
            case status.LOAD | status.REFRESH:
                return self.load_s, "generation.load_timeout_s"
            case status.CANARY | status.SHARD:
                return self.shard_s, "generation.shard_timeout_s"
            case status.WAIT:
                return math.inf, ""  # for others, whose own steps have limits
            case _:
                return _END_TIMEOUT_S, ""


class SamplerJob:
    """A request that the sampler's process is at work on.

    It is a `RunningJob` of the loop, with one difference: `poll` raises the typed error
    where it failed. An engine of an earlier request is used where there is one; whatever
    goes wrong with it, a new one is started, once, and `progress` is told.

    Args:
        request: What it is asked to do.
        request_path: Where that is written.
        interpreter: What the process runs under.
        timeouts: Seconds for loading and for each shard.
        progress: Told when an engine is given up.
        keeper: Holds the process between requests; None: it ends with this one.
        keep: `generation.keep_engine`.
        slot: Which of the keeper's processes serves it.
        placement: Where a new process runs.
    """

    def __init__(
        self,
        *,
        request: GenerationRequest,
        request_path: Path,
        interpreter: Interpreter,
        timeouts: Timeouts,
        progress: Progress,
        keeper: EngineKeeper | None,
        keep: str,
        slot: int = 0,
        placement: Placement = HERE,
    ) -> None:
        self._request = request
        self._request_path = request_path
        self._interpreter = interpreter
        self._timeouts = timeouts
        self._progress = progress
        self._keeper = keeper or EngineKeeper()
        self._keep = NEVER if keeper is None else keep
        self._slot = slot
        self._placement = placement
        self._log_path = Path(request.log_path)
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        self._is_handed_over = self._is_ending = False
        self._given_up: str | None = None
        self._process = self._begin(self._keeper.take(request.engine, interpreter.python, slot=slot))

    @property
    def pid(self) -> int:
        """Of the process, and of its group."""
        return self._process.pid

    @property
    def share(self) -> status.Share:
        """What this sampler has answered, where it is one of several."""
        return self._status.share

    @property
    def notes(self) -> dict[str, Any]:
        """How the request came to its engine, for the manifest; empty before it has."""
        opened = self._status.opened
        if opened is None:
            return {}
        engine: dict[str, Any] = {"way": opened.way, "seconds": round(self._seconds or opened.seconds, 3)}
        if opened.canary_difference is not None:
            engine |= {
                "canary_difference": opened.canary_difference,
                "canary_texts": opened.canary_texts,
            }
        if self._given_up is not None:
            engine["given_up"] = self._given_up
        return {"engine": engine}

    def poll(self) -> int | None:
        """None while it runs, 0 when all is done. It does not wait.

        Raises:
            NemoSpinError: It failed, or a step took too long; the process is ended.
        """
        if self._is_handed_over:
            return 0
        try:
            return self._look()
        except (GenerationError, GateError) as error:
            if self._is_fresh:
                raise
            self._start_again(error)
            return None

    def stop(self) -> None:
        """Ends the whole process group, within seconds, unless it waits for the next request."""
        if not self._is_handed_over:
            self._process.stop()

    def kill(self) -> None:
        """Ends the whole process group at once, unless it waits for the next request."""
        if not self._is_handed_over:
            self._process.kill()

    def describe_failure(self) -> str:
        """The last lines of its log, and the log's path."""
        return f"{self._last_lines()}\n  log:    {self._log_path}"

    def _begin(self, kept: SamplerProcess | None) -> SamplerProcess:
        """Hands the request to the process that was kept, or to a new one."""
        status_path = Path(self._request.status_path)
        status_path.unlink(missing_ok=True)
        self._status = status.StatusReader(status_path)
        self._log_begin = self._log_path.stat().st_size if self._log_path.exists() else 0
        self._seconds: float | None = None
        self._is_fresh = kept is None
        self._step, self._step_began = self._status.step, time.monotonic()
        if kept is None:
            return SamplerProcess(
                self._interpreter,
                request_path=self._request_path,
                log_path=self._log_path,
                placement=self._placement,
            )
        try:
            kept.send(self._request_path)
        except OSError:
            kept.stop()  # it has just ended: `poll` finds that out, and says what was in its log
        return kept

    def _start_again(self, error: NemoSpinError) -> None:
        self._process.kill()
        if self._request.leases is not None:  # the new process takes its own
            forget(Path(self._request.leases.directory), self._request.leases.owner)
        self._given_up = str(error).splitlines()[0][:300]
        self._progress.note(f"the engine of the stage before is given up, a new one starts: {self._given_up}")
        self._process = self._begin(None)

    def _look(self) -> int | None:
        code = self._process.poll()
        self._status.poll()
        if self._status.opened is not None and self._seconds is None:
            started = self._status.opened.way == status.STARTED
            since = self._process.began
            self._seconds = time.monotonic() - since if started else self._status.opened.seconds
        is_done = self._status.step.kind == status.DONE
        if code is None:
            return self._done() if is_done else self._watch()
        self._process.kill()  # what is left of its group
        if is_done:
            return 0
        raise self._failure(code)

    def _done(self) -> int | None:
        """All is answered: the process is kept, or ends by itself within a minute."""
        opened = self._status.opened
        assert opened is not None, "nothing is answered before there is an engine"
        if not self._is_ending:
            settings = self._request.engine
            self._is_handed_over = self._keeper.put(
                self._process, settings=settings, opened=opened, mode=self._keep, slot=self._slot
            )
            if self._is_handed_over:
                return 0
            self._process.end_input()
            self._is_ending = True
        return self._watch()

    def _watch(self) -> int | None:
        now = time.monotonic()
        if self._status.step != self._step:
            self._step, self._step_began = self._status.step, now
        limit_s, key = self._timeouts.of(self._step.kind)
        if now - self._step_began <= limit_s:
            return None
        self._process.kill()
        if self._step.kind == status.DONE:
            return 0
        what = "answering" if self._step.kind == status.SHARD else "loading"
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


class NothingToDo:
    """A job that was done before it began."""

    notes: dict[str, Any] = {}  # noqa: RUF012  (nobody writes into it)

    def poll(self) -> int | None:
        """Done."""
        return 0

    def stop(self) -> None:
        """Nothing runs."""

    def describe_failure(self) -> str:
        """There is none."""
        return ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
