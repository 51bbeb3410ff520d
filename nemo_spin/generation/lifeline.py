"""Ends a process and all it has started as soon as the one that started it is gone.

However that ended: a sampler that lives on would hold memory and devices, and write into
a run directory that another command may be using by then.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time

PARENT_VARIABLE = "NEMO_SPIN_PARENT_PID"
_PR_SET_PDEATHSIG = 1
_POLL_S = 1.0


def die_with_parent() -> None:
    """Ties this process's group to the parent that `NEMO_SPIN_PARENT_PID` names.

    On Linux the kernel ends this process with its parent, and a guard (a child that does
    nothing else) then ends the rest of the group: engines that use several devices start
    processes of their own, which the kernel does not count. Everywhere, a thread looks at
    the parent once a second. To be called early, while this process has one thread.

    The kernel counts the *thread* that started this process as its parent: start it from
    one that stays.
    """
    named = os.environ.get(PARENT_VARIABLE)
    if named is None:
        return
    parent = int(named)
    if sys.platform == "linux":
        if _leads_its_group():
            _start_guard()
        _ask_for_signal(signal.SIGKILL)
    if os.getppid() != parent:
        _end_group()
    threading.Thread(target=_watch, args=(parent,), name="lifeline", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    _end_group()


def _start_guard() -> None:
    guarded = os.getpid()
    if os.fork():
        return
    try:
        # The signal stays pending until it is waited for: none is lost between two looks.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
        _ask_for_signal(signal.SIGTERM)
        while os.getppid() == guarded:
            signal.sigtimedwait({signal.SIGTERM}, _POLL_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(guarded, signal.SIGKILL)
    finally:
        os._exit(0)


def _ask_for_signal(number: signal.Signals) -> None:
    """Has the kernel send `number` to this process when its parent ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def _leads_its_group() -> bool:
    return os.getpgrp() == os.getpid()


def _end_group() -> None:
    if _leads_its_group():  # never the user's shell
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)
