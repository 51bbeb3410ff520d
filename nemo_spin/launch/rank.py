"""The first thing that runs in every rank: `python -m nemo_spin.launch.rank MODULE ARGUMENTS`.

It ties the rank's life to its launcher's, runs the module as `python -m` would, and
notes when and why it failed, so that the launcher can tell the first failure from those
that follow from it. It imports the standard library alone: checkpoint writers that start
by spawning import the module that runs, and not this one.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

FAILURE_VARIABLE = "NEMO_SPIN_FAILURE"  # file for the note of a failure
LAUNCHER_VARIABLE = "NEMO_SPIN_LAUNCHER_PID"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_launcher() -> None:
    """Has the kernel kill this process when its launcher dies, however that happens.

    Otherwise ranks of a launcher that was killed would go on writing into a run
    directory in which the next command is at work already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher is not None and os.getppid() != int(launcher):
        os._exit(128 + signal.SIGKILL)  # it died before the kernel knew


def _note_failure(error: BaseException) -> None:
    path = os.environ.get(FAILURE_VARIABLE)
    if path is None:
        return
    lines = str(error).splitlines()
    note = {"time": time.time(), "type": type(error).__name__, "message": lines[0] if lines else ""}
    partial = Path(f"{path}.partial")
    try:
        partial.write_text(json.dumps(note), encoding="utf-8")
        partial.replace(path)
    except OSError as problem:  # such as a full disk: the log has the traceback
        print(f"the failure could not be noted in {path}: {problem}", file=sys.stderr)


def main() -> None:
    """Runs the module named by the first argument with the arguments after it."""
    die_with_launcher()
    del sys.argv[0]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except BaseException as error:
        if not (isinstance(error, SystemExit) and error.code in (None, 0)):
            _note_failure(error)
        raise


if __name__ == "__main__":
    main()
