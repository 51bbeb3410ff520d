"""One command at a time works on a run directory.

The lock is a file that names host and process of its owner, made by `link` (which
network file systems do atomically, unlike `flock`). A lock whose owner is dead is taken
over: at once where this machine can see that the process is gone, otherwise after the
file's heartbeat was seen standing still for a while. Only changes of the heartbeat are
looked at, so clocks that differ between machines do no harm.

Slurm may give up a host that lives on: its network is gone, or it hung for a while. So the
lock of an earlier start of the same job is taken over even where its heart beats, and an owner
that finds another's name in the lock kills itself at once: it must not write another byte.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_spin.data.files import NO_LINKS
from nemo_spin.errors import ConfigError, explain
from nemo_spin.selfplay.storage import storage_error

HEARTBEAT_S = 10.0
SILENT_AFTER_S = 60.0
_SETTLES_AFTER_S = 0.5
_ENDED_WITHIN_S = 3 * HEARTBEAT_S  # an owner that is alive, and not any more the owner
_SLOW_LOOK_S = 5.0  # a file system that answers so late keeps hearts from beating, too


@dataclass(frozen=True)
class Owner:
    """A process, so that it cannot be mistaken for another one with its number.

    Attributes:
        host: Name of the machine.
        pid: Process number in its namespace.
        started: Kernel ticks since boot at which the process started.
        boot: Identity of the machine's current uptime.
        namespace: The process-number namespace (containers have their own).
        job: Of Slurm, by its number; empty: none.
        restarts: How often Slurm has put it back into the queue.
    """

    host: str
    pid: int
    started: int
    boot: str
    namespace: str
    job: str = ""
    restarts: int = 0

    @classmethod
    def of_this_process(cls) -> Owner:
        """The running process."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=_start_ticks(os.getpid()) or 0,
            boot=_boot_id(),
            namespace=_pid_namespace(),
            job=os.environ.get("SLURM_JOB_ID", ""),
            restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        )

    def was_given_up_for(self, other: Owner) -> bool:
        """Whether Slurm has started the job of `other` again, of which this is an earlier start."""
        return self.job != "" and self.job == other.job and self.restarts < other.restarts

    def alive(self) -> bool | None:
        """Whether the process is running; None where this machine cannot see it."""
        if self.boot != _boot_id() or self.namespace != _pid_namespace():
            return None  # another machine (names are not unique), another uptime, another container
        return _start_ticks(self.pid) == self.started


def _start_ticks(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])  # a zombie works on nothing


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def _pid_namespace() -> str:
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def read_owner(path: Path) -> Owner | None:
    """Who holds the lock at `path`; None if nobody does (or the file says nothing)."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    return None


@contextlib.contextmanager
def locked(path: Path, *, on_wait: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Holds the lock at `path`.

    Args:
        path: The lock file. Its directory must exist.
        on_wait: Told in one line why the command waits for a while.

    Raises:
        ConfigError: Another living command holds it.
        DataError: The file cannot be written.
    """
    owner = Owner.of_this_process()
    inherits = displaces = False
    while not _create(path, owner) or (inherits and not _is_kept(path, owner)):
        inherits = True
        displaces |= _remove_if_dead(path, owner, on_wait)
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, owner, ended), daemon=True)
    heart.start()
    try:
        if displaces:
            time.sleep(_ENDED_WITHIN_S)
        yield
    finally:
        ended.set()
        heart.join()
        if read_owner(path) == owner:
            path.unlink(missing_ok=True)


def _create(path: Path, owner: Owner) -> bool:
    mine = path.with_name(f".{path.name}.{owner.host}.{owner.pid}.partial")
    text = json.dumps(asdict(owner)) + "\n"
    try:
        mine.write_text(text, encoding="utf-8")
        _link(mine, path, text)
        return True
    except FileExistsError:
        return _is_one_file(mine, path)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            mine.unlink(missing_ok=True)


def _is_kept(path: Path, owner: Owner) -> bool:
    """Whether the lock is still ours after a moment.

    One who saw the same dead owner may take our lock for the dead one's and, before it gives it back,
    somebody else may lock.
    """
    time.sleep(_SETTLES_AFTER_S)
    return read_owner(path) == owner


def _is_one_file(mine: Path, path: Path) -> bool:
    """Whether the lock was made after all: NFS asks again where an answer was lost, and then it is there."""
    with contextlib.suppress(OSError):
        return os.path.samefile(mine, path)
    return False


def _link(mine: Path, path: Path, text: str) -> None:
    """Gives the file its name, unless it is taken."""
    try:
        os.link(mine, path)
    except FileNotFoundError as error:  # the owner of the lock has tidied up: look again
        raise FileExistsError from error
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)


def _beat(path: Path, owner: Owner, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_S):
        holder = read_owner(path)
        if holder == owner:
            with contextlib.suppress(OSError):
                os.utime(path)
        elif holder is not None and not ended.is_set():
            _end_at_once(path, holder)


def _end_at_once(path: Path, holder: Owner) -> None:
    """Its ranks and samplers end with this process; what it was told to save would be another's by now."""
    sys.stderr.write(f"{path} was taken over by process {holder.pid} on {holder.host}: this one ends\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def _remove_if_dead(path: Path, me: Owner, on_wait: Callable[[str], None]) -> bool:
    """Removes the lock of who is dead, or was given up; returns whether its owner may be alive."""
    owner = read_owner(path)
    if owner is None:
        if not path.exists():
            return False
        raise _held(path, "by something that left no name")
    alive = owner.alive()
    displaces = alive is not False and owner.was_given_up_for(me)
    if displaces:
        on_wait(
            f"{path} is held by process {owner.pid} on {owner.host}, of an earlier start of this job, which "
            f"Slurm has given up: taking over, when it had {_ENDED_WITHIN_S:.0f} s to find that out"
        )
        alive = False
    if alive is None:
        on_wait(
            f"{path} is held by process {owner.pid} on {owner.host}, which cannot be seen from here: "
            f"watching its heartbeat for up to {SILENT_AFTER_S:.0f} s"
        )
        alive = _heart_beats(path)
    if alive:
        raise _held(path, f"by process {owner.pid} on {owner.host}, which is running")
    grave = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        os.rename(path, grave)
    except FileNotFoundError:
        return False
    if read_owner(grave) != owner:  # someone was faster, and this is their new lock: give it back
        with contextlib.suppress(FileExistsError):
            os.link(grave, path)
        displaces = False
    grave.unlink(missing_ok=True)
    return displaces


def _heart_beats(path: Path) -> bool:
    end = time.monotonic() + SILENT_AFTER_S
    try:
        first = path.stat().st_mtime_ns
        while (began := time.monotonic()) < end:
            time.sleep(0.2)
            if path.stat().st_mtime_ns != first:
                return True
            if time.monotonic() - began > _SLOW_LOOK_S:
                end = time.monotonic() + SILENT_AFTER_S
    except FileNotFoundError:
        pass
    return False


def _held(path: Path, found: str) -> ConfigError:
    return ConfigError(
        explain(
            str(path),
            found=f"is held {found}",
            rule="one command at a time works on a run directory",
            remedy="wait for it, stop it, or give another run_dir; if you know that it is gone, "
            f"remove {path}",
        )
    )
