"""Where the time of a rank goes, phase by phase, and how many token positions it computes.

Whoever drives an engine names the phases; the engine itself times the collating of
microbatches inside them. Nothing is measured twice: phases do not overlap, and what lies
between them is the rest of the time that has passed.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed

from nemo_spin.data.packing import Microbatch
from nemo_spin.megatron.runtime import Runtime

GIB = 2**30
_NO_PHASE = ""


@dataclass(frozen=True)
class Reading:
    """What passed between two readings.

    Attributes:
        seconds: Wall time.
        data_seconds: Packing and collating, inside the phase that computes.
        phases: Seconds of every phase that was asked for; the one that computes without
            `data_seconds`.
        slots: Token positions computed in that phase, padding included.
        peak_bytes: Most memory held since the process started.
    """

    seconds: float
    data_seconds: float
    phases: dict[str, float]
    slots: int
    peak_bytes: int


class Meter:
    """A rank's stopwatch; runs from its making, or from the last reading."""

    def __init__(self) -> None:
        self._phase = _NO_PHASE
        self._clear()

    def _clear(self) -> None:
        self._since = time.monotonic()
        self._seconds: dict[str, float] = defaultdict(float)
        self._collating: dict[str, float] = defaultdict(float)
        self._slots: dict[str, int] = defaultdict(int)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time inside to phase `name`; kernels that run on are waited for."""
        assert self._phase == _NO_PHASE, f"{name} begins inside {self._phase}"
        self._phase, began = name, time.monotonic()
        try:
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        finally:
            self._seconds[name] += time.monotonic() - began
            self._phase = _NO_PHASE

    @contextmanager
    def collating(self) -> Iterator[None]:
        """Time inside the current phase that goes into packing and collating."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._collating[self._phase] += time.monotonic() - began

    def watch(self, microbatches: Iterator[Microbatch], *, counts: bool) -> Iterator[Microbatch]:
        """The same microbatches; their making is timed and, where `counts`, their positions are added."""
        while True:
            with self.collating():
                microbatch = next(microbatches, None)
            if microbatch is None:
                return
            if counts:
                self._slots[self._phase] += microbatch.num_slots
            yield microbatch

    def read(self, runtime: Runtime, *, computing: str, others: tuple[str, ...]) -> Reading:
        """What passed since the last reading. All ranks must call: one all-gather.

        Seconds are the first rank's, so that phases add up; what it waits for others is part of the
        phase in which they meet. Memory is that of the rank where it is most; slots are summed
        over the ranks that have rows of their own.

        Args:
            runtime: This rank's place.
            computing: The phase whose collating and slots count.
            others: The further phases to report.
        """
        counts = runtime.is_last_stage and runtime.tp_rank == 0
        mine = [
            float(self._slots[computing]) if counts else 0.0,
            float(peak_bytes()),
            time.monotonic() - self._since,
            self._collating[computing],
            *(self._seconds[name] for name in (computing, *others)),
        ]
        self._clear()
        sent = torch.tensor(mine, dtype=torch.float64, device=runtime.device)
        received = sent.new_empty(runtime.world_size * len(mine))
        distributed.all_gather_into_tensor(received, sent)
        ranks = received.cpu().view(runtime.world_size, len(mine))
        seconds, data, computed, *rest = ranks[0, 2:].tolist()
        return Reading(
            seconds=seconds,
            data_seconds=data,
            phases={computing: computed - data, **dict(zip(others, rest, strict=True))},
            slots=int(ranks[:, 0].sum()),
            peak_bytes=int(ranks[:, 1].max()),
        )


def peak_bytes() -> int:
    """Most memory held at once: tensors of this process's GPU, or all of the process on a CPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
