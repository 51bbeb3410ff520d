"""Leases on shards: several samplers, on any machines, take shards from one directory.

- A lease is `SHARD.lease`, a hard link to a file of its owner's: `link` is atomic on network file
  systems, too, where `flock` may do nothing.
- The owner touches its own file now and then, and so every lease that it holds.
- An owner is taken to be dead when its lease did not change for a time, by the observer's own
  clock: the clocks of two machines are never compared.
- Whoever takes over renames the lease to a name of its own first: one rename succeeds.

Nothing here has to be perfect: two samplers may come to work on one shard, for instance
when one was paused for long. Equal requests get equal answers and the first to publish a
shard wins (`shards.write_shard`), so each row is there once in any case; a lease only
saves doing it twice.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_spin.data.files import NO_LINKS

_LEASE, _OWNER = ".lease", ".owner"
_BEATS = 8  # signs of life in the time after which an owner is taken to be dead
_LONGEST_BEAT_S = 10.0


@dataclass(frozen=True)
class LeaseSettings:
    """How a sampler takes shards.

    Attributes:
        directory: Where leases lie, the same for all samplers of a stage.
        owner: Of this process alone, and used once.
        silent_s: An owner is dead whose sign of life was missed for as many seconds.
    """

    directory: str
    owner: str
    silent_s: float


@dataclass(frozen=True)
class _Seen:
    """A lease as it was when it last changed, and when that was on this process's own clock."""

    inode: int
    touched_ns: int
    since: float


class Leases:
    """One sampler's view of the leases; it holds one at a time.

    Args:
        settings: See `LeaseSettings`.

    Raises:
        OSError: The directory cannot be written.
    """

    def __init__(self, settings: LeaseSettings) -> None:
        self._directory = Path(settings.directory)
        self._owner = settings.owner
        self._silent_s = settings.silent_s
        self._directory.mkdir(parents=True, exist_ok=True)
        self._mine = self._directory / f"{settings.owner}{_OWNER}"
        self._file = os.open(self._mine, os.O_CREAT | os.O_WRONLY, 0o644)
        os.write(self._file, settings.owner.encode())
        self._copies: dict[str, int] = {}  # where there are no hard links: a lease is a file of its own
        self._seen: dict[str, _Seen] = {}
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._heart.start()

    def close(self) -> None:
        """Gives no more signs of life."""
        self._ended.set()
        self._heart.join()
        self._mine.unlink(missing_ok=True)
        for descriptor in (self._file, *self._copies.values()):
            os.close(descriptor)

    def take(self, name: str) -> bool:
        """Takes the lease on `name`, unless somebody alive has it."""
        if self._make(name):
            return True
        return self._is_abandoned(name) and self._remove(name) and self._make(name)

    def release(self, name: str) -> None:
        """Gives it back; harmless where it was taken over meanwhile."""
        copy = self._copies.pop(name, None)
        if self._is_mine(name, self._file if copy is None else copy):
            self._path(name).unlink(missing_ok=True)
        if copy is not None:
            os.close(copy)

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}{_LEASE}"

    def _make(self, name: str) -> bool:
        path = self._path(name)
        try:
            os.link(self._mine, path)
        except FileExistsError:
            # An answer that NFS lost is asked for again, and then says that the link is there.
            return self._is_mine(name, self._file)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            return self._make_copy(name)
        return True

    def _make_copy(self, name: str) -> bool:
        try:
            descriptor = os.open(self._path(name), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        os.write(descriptor, self._owner.encode())
        self._copies[name] = descriptor
        return True

    def _is_mine(self, name: str, descriptor: int) -> bool:
        with contextlib.suppress(OSError):
            return os.path.samestat(os.stat(self._path(name)), os.fstat(descriptor))
        return False

    def _is_abandoned(self, name: str) -> bool:
        """Whether the lease has not changed since this process first saw it so, long ago."""
        try:
            with self._path(name).open("rb") as stream:  # opening it, NFS asks the server for its times
                status = os.fstat(stream.fileno())
        except OSError:
            self._seen.pop(name, None)
            return False
        now, last = time.monotonic(), self._seen.get(name)
        if last is None or (last.inode, last.touched_ns) != (status.st_ino, status.st_mtime_ns):
            self._seen[name] = _Seen(status.st_ino, status.st_mtime_ns, now)
            return False
        return now - last.since > self._silent_s

    def _remove(self, name: str) -> bool:
        """Removes an abandoned lease; False where another process was faster."""
        seen = self._seen.pop(name)
        grave = self._directory / f".{name}.{self._owner}.old"
        try:
            os.rename(self._path(name), grave)
        except FileNotFoundError:
            return False
        is_it = grave.stat().st_ino == seen.inode
        if not is_it:  # somebody has taken it over meanwhile, and this is the new lease: give it back
            with contextlib.suppress(OSError):
                os.link(grave, self._path(name))
        grave.unlink(missing_ok=True)
        return is_it

    def _beat(self) -> None:
        # Descriptors, not names: one that was paused for long must not keep another's lease alive.
        while not self._ended.wait(min(_LONGEST_BEAT_S, self._silent_s / _BEATS)):
            for descriptor in (self._file, *list(self._copies.values())):
                with contextlib.suppress(OSError):
                    os.utime(descriptor)


def forget(directory: Path, owner: str) -> None:
    """Removes the leases of an owner that is known to be dead, so that nobody waits for its silence."""
    for path in _leases(directory):
        with contextlib.suppress(OSError):
            if path.read_bytes() == owner.encode():
                path.unlink()
    (directory / f"{owner}{_OWNER}").unlink(missing_ok=True)


def _leases(directory: Path) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError):
        yield from sorted(directory.glob(f"*{_LEASE}"))
