"""Ends a command cleanly when it is asked to stop.

SIGINT raises KeyboardInterrupt as always. SIGTERM (Slurm, containers, `kill`) and SIGUSR1
(Slurm's warning before it takes the machine) raise SystemExit with the exit code `PREEMPTED`,
SIGHUP (a closed terminal) with the one that shells expect. So the same `finally` clauses end
the children and say in state.json that the run was interrupted; a training is let save first
(`following.py`).
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from nemo_spin.errors import PREEMPTED, PreemptedError

STOPPED = (KeyboardInterrupt, SystemExit, PreemptedError)
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """SIGTERM and SIGUSR1 raise SystemExit(PREEMPTED), SIGHUP SystemExit(128 + signal) inside the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # not of nohup
    before = {number: signal.signal(number, _stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def undisturbed(*, stopping: bool = False) -> Iterator[None]:
    """Lets children be ended (which takes seconds) before the next request to stop is heard.

    The first one that came is obeyed on leaving the block. None is, where the block is part of
    obeying an earlier one: where `stopping` says so, or the exception that is on its way.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stopping = stopping or isinstance(sys.exception(), STOPPED)
    asked: list[int] = []
    heard = [number for number in (*_SIGNALS, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, _: asked.append(number)) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if asked and not stopping:
            signal.raise_signal(asked[0])


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number if number == signal.SIGHUP else PREEMPTED)
