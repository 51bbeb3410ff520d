"""The first thing that runs in every rank: `python -m nemo_spin.launch.rank MODULE ARGUMENTS`.

It ties the rank's life to its launcher's, runs the module as `python -m` would, and
notes when and why it failed, so that the launcher can tell the first failure from those
that follow from it. In a step of Slurm's it also finds out which rank it is, opens its log and
meets the others. It imports the standard library and files of ours that do: checkpoint writers
that start by spawning import the module that runs, and not this one.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import runpy
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from nemo_spin.errors import PREEMPTED
from nemo_spin.launch import meeting, placement

FAILURE_VARIABLE = "NEMO_SPIN_FAILURE"  # file for the note of a failure
LAUNCHER_VARIABLE = "NEMO_SPIN_LAUNCHER_PID"
STEP_VARIABLE = "NEMO_SPIN_STEP"  # in a step: what the names of its files begin with
ALONE_VARIABLE = "NEMO_SPIN_DEAF"  # SIGUSR1 is for the process that started this one
JOIN_VARIABLE = "NEMO_SPIN_JOIN_TIMEOUT_S"
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
    note = {
        "time": time.time(),
        "type": type(error).__name__,
        "message": lines[0] if lines else "",
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
    }
    partial = Path(f"{path}.partial")
    try:
        partial.write_text(json.dumps(note), encoding="utf-8")
        partial.replace(path)
    except OSError as problem:  # such as a full disk: the log has the traceback
        print(f"the failure could not be noted in {path}: {problem}", file=sys.stderr)


def step_files(stem: str, rank: int) -> tuple[Path, Path]:
    """A rank's log and the note of its failure."""
    log = Path(f"{stem}.rank_{rank}.log")
    return log, log.with_suffix(".failure.json")


def _join_step(stem: str) -> socket.socket | None:
    """Becomes a rank of a step of Slurm's; rank 0 holds the port until it listens there."""
    place = placement.of_a_step(os.environ)
    log, failure = step_files(stem, place.rank)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    os.close(descriptor)
    os.environ.update(place.variables())
    os.environ[FAILURE_VARIABLE] = str(failure)
    _hear_alone()
    path, holder = Path(f"{stem}.meeting.json"), None
    try:
        if place.rank == 0:
            address = meeting.own_address(os.environ)
            holder, port = meeting.call_together(path, address)
        else:
            address, port = meeting.await_call(path, float(os.environ.get(JOIN_VARIABLE, "600")))
    except OSError as error:  # TimeoutError among them
        _note_failure(error)
        raise
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    return holder


def _hear_alone() -> None:
    """Takes SIGUSR1 as SIGTERM, for this process alone.

    Slurm sends a step's signal to every process in it. Children, such as those that write a
    checkpoint, inherit that it is blocked, and go on.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})

    main_thread = threading.get_ident()

    def pass_on() -> None:
        while True:
            signal.sigwait({signal.SIGUSR1})
            signal.pthread_kill(main_thread, signal.SIGTERM)  # whose waiting it ends

    threading.Thread(target=pass_on, name="slurm-signal", daemon=True).start()


def main() -> None:
    """Runs the module named by the first argument with the arguments after it."""
    die_with_launcher()
    if ALONE_VARIABLE in os.environ:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    stem = os.environ.get(STEP_VARIABLE)
    holder = _join_step(stem) if stem is not None else None
    del sys.argv[0]
    try:
        _run_module()
    except BaseException as error:
        _note_failure(error)
        if stem is not None and isinstance(error, SystemExit) and error.code == PREEMPTED:
            sys.exit(0)  # srun would end the others at any other code, and some may still be saving
        raise
    finally:
        if holder is not None:
            holder.close()
    _leave()


def _run_module() -> None:
    """Returns where the module ends well."""
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if ended.code not in (None, 0):
            raise


def _leave() -> None:
    """Ends the process without taking Megatron and NeMo apart, for which an interpreter needs 1 to 3 s.

    What was registered for the end of a process is done (Weights & Biases sends the last rows then). A
    module that has ended well has closed its files, and left no thread with work to do.
    """
    atexit._run_exitfuncs()  # as the interpreter does
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
