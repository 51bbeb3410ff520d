"""Several samplers at work on one request: progress added up, the dead ones replaced."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_spin.data.files import remove_partials
from nemo_spin.data.progress import Progress
from nemo_spin.errors import GenerationError, NemoSpinError, explain
from nemo_spin.generation.job import SamplerJob
from nemo_spin.generation.leases import forget
from nemo_spin.generation.request import GenerationRequest
from nemo_spin.generation.status import Share

_LOOK_S = 1.0  # between two looks at which shards are there
_GRACE_S = 10.0  # for the others to see that nothing is left
_LONGEST_WAIT_S = 30.0

Start = Callable[[int, int], SamplerJob]


@dataclass
class _Replica:
    """One of the samplers, over all its lives.

    Attributes:
        index: From 0.
        job: Its present life; None: it is dead.
        starts: How often it was started.
        failures: Deaths since it last published a shard.
        due: When it is started again, on the monotonic clock; None: never.
    """

    index: int
    job: SamplerJob | None = None
    starts: int = 0
    failures: int = 0
    due: float | None = 0.0
    is_done: bool = False


class ReplicasJob:
    """A `RunningJob` of several samplers that share the shards by leases (`leases.py`).

    A sampler that dies loses its shard to the others at once, and is started again unless
    it has died `attempts` times without publishing anything in between. The job fails when
    all are dead, with the first error; and on errors that another engine would run into
    too, such as a full disk or a wrong canary.

    Args:
        request: What they do together, of which `start` gives each its own.
        replicas: How many samplers.
        start: Starts the i-th sampler for the n-th time.
        attempts: See above.
        progress: Shows the sum.
    """

    def __init__(
        self,
        *,
        request: GenerationRequest,
        replicas: int,
        start: Start,
        attempts: int,
        progress: Progress,
    ) -> None:
        assert request.leases is not None, "samplers that share a request share it by leases"
        self._leases_dir = Path(request.leases.directory)
        self._out_dir = Path(request.out_dir)
        self._start = start
        self._attempts = attempts
        self._progress = progress
        self._answers = {
            shard.file: shard.rows * generation.num_generations
            for generation in request.passes
            for shard in generation.shards
        }
        self._replicas = [_Replica(index) for index in range(replicas)]
        self._first_error: NemoSpinError | None = None
        self._deaths = 0
        self._earlier = Share()  # of lives that have ended
        self._shown = self._published = 0
        self._looked = self._done_since = float("-inf")
        self._began = time.monotonic()
        shutil.rmtree(self._leases_dir, ignore_errors=True)
        try:
            self._start_those_due()
        except BaseException:
            self.stop()
            raise

    @property
    def pids(self) -> list[int]:
        """Of the processes that run, each the leader of a group."""
        return [replica.job.pid for replica in self._replicas if replica.job and not replica.is_done]

    @property
    def notes(self) -> dict[str, Any]:
        """How the slowest of the samplers came to its engine, for the manifest."""
        engines = [replica.job.notes.get("engine") for replica in self._replicas if replica.job]
        known = sorted(filter(None, engines), key=lambda engine: float(engine["seconds"]))
        if not known:
            return {}
        return {"engine": {**known[-1], "samplers": len(self._replicas), "deaths": self._deaths}}

    def poll(self) -> int | None:
        """None while shards are missing, 0 when all are there. It does not wait.

        Raises:
            NemoSpinError: All samplers are dead, or one met what the others would meet too.
        """
        for replica in self._replicas:
            self._look(replica)
        if any(replica.is_done for replica in self._replicas):
            return self._end()
        self._start_those_due()
        self._show()
        if all(replica.job is None and replica.due is None for replica in self._replicas):
            assert self._first_error is not None, "a sampler that is dead has failed"
            raise self._all_dead(self._first_error)
        return None

    def stop(self) -> None:
        """Ends all processes, within seconds, but those that wait for another request."""
        jobs = [replica.job for replica in self._replicas if replica.job is not None]
        with ThreadPoolExecutor(max(1, len(jobs))) as pool:
            list(pool.map(SamplerJob.stop, jobs))
        shutil.rmtree(self._leases_dir, ignore_errors=True)
        remove_partials(self._out_dir)  # of those that were killed

    def describe_failure(self) -> str:
        """What the first sampler that died had to say."""
        return "" if self._first_error is None else str(self._first_error)

    def _look(self, replica: _Replica) -> None:
        if replica.job is None or replica.is_done:
            return
        try:
            replica.is_done = replica.job.poll() == 0
        except GenerationError as error:
            self._bury(replica, replica.job, error)

    def _bury(self, replica: _Replica, job: SamplerJob, error: GenerationError) -> None:
        """Notes a death, gives its shard to the others, and says when it lives again."""
        forget(self._leases_dir, owner_of(replica.index, replica.starts))
        self._deaths += 1
        self._first_error = self._first_error or error
        share = job.share
        self._earlier.answers += share.answers
        self._earlier.tokens += share.tokens
        replica.failures = 1 if share.answers else replica.failures + 1
        replica.job, replica.due = None, None
        said = str(error).splitlines()[0][:200]
        if replica.failures >= self._attempts:
            self._progress.note(f"sampler {replica.index} is given up, the others go on: {said}")
            return
        wait_s = 0.0 if replica.failures == 1 else min(_LONGEST_WAIT_S, 2.0 ** (replica.failures - 2))
        replica.due = time.monotonic() + wait_s
        self._progress.note(f"sampler {replica.index} is started again, the others go on: {said}")

    def _start_those_due(self) -> None:
        for replica in self._replicas:
            if replica.job is None and replica.due is not None and time.monotonic() >= replica.due:
                replica.starts += 1
                replica.job = self._start(replica.index, replica.starts)

    def _end(self) -> int | None:
        """All shards are there: the others see it too, or have been paused and are not needed."""
        now = time.monotonic()
        if self._done_since == float("-inf"):
            self._done_since = now
            self._show(is_last=True)
        for replica in self._replicas:
            if replica.job is not None and not replica.is_done and now - self._done_since > _GRACE_S:
                replica.job.kill()
                replica.job = None
        return 0 if all(replica.is_done or replica.job is None for replica in self._replicas) else None

    def _show(self, *, is_last: bool = False) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_S and not is_last:
            return
        self._looked = now
        there = {path.name for path in self._out_dir.glob("*.parquet")}
        self._published = sum(count for name, count in self._answers.items() if name in there)
        total = sum(self._answers.values())
        shares = [self._earlier, *(replica.job.share for replica in self._replicas if replica.job)]
        under_way = sum(share.in_shard for share in shares)
        self._shown = min(total, max(self._shown, self._published + under_way))
        answers, tokens = (sum(getattr(share, name) for share in shares) for name in ("answers", "tokens"))
        running = sum(replica.job is not None for replica in self._replicas)
        values: dict[str, Any] = {"samplers": running}
        if answers:
            values["tokens_per_s"] = round(tokens / (now - self._began), 1)
            values["mean_length"] = round(tokens / answers, 1)
        self._progress.update(total if is_last else self._shown, total, "answers", **values)

    def _all_dead(self, first: NemoSpinError) -> GenerationError:
        return GenerationError(
            explain(
                f"generation: all {len(self._replicas)} samplers",
                found=f"have died, {self._deaths} times in all; the first said:\n{first}",
                rule="a sampler that dies is started again, until it has died "
                f"generation.replica_attempts ({self._attempts}) times without a shard in between",
                remedy="look at the log above; the same command goes on where it was",
            )
        )


def owner_of(index: int, start: int) -> str:
    """The name under which the n-th life of a sampler takes leases."""
    return f"sampler-{index:03d}-{start:04d}"
