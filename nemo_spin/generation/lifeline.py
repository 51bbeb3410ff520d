"""Ends a process as soon as the one that started it is gone, however that ended."""

from __future__ import annotations

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
    """Ends this process's group once the parent named by `NEMO_SPIN_PARENT_PID` is gone.

    On Linux the kernel does it; a thread that looks once a second does it everywhere, and
    also where the parent was gone before this call. The kernel counts the *thread* that
    started this process as its parent: start it from one that stays.
    """
    named = os.environ.get(PARENT_VARIABLE)
    if named is None:
        return
    parent = int(named)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        _end_group()
    threading.Thread(target=_watch, args=(parent,), name="lifeline", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    _end_group()


def _end_group() -> None:
    if os.getpgrp() == os.getpid():  # a group of our own, never the user's shell
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)
