"""What a disk that is full, gone or read-only has to say."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from nemo_spin.errors import DataError, explain

_FULL = (errno.ENOSPC, errno.EDQUOT)
_MIN_FREE_BYTES = 256 << 10


def storage_error(path: Path, error: OSError) -> DataError:
    """The error for a file of the run directory that could not be made or written.

    Args:
        path: The run directory, or a file of it.
        error: What the system said; it may name the very file.
    """
    return DataError(
        explain(
            str(error.filename or path),
            found=f"could not be written ({error.strerror or error})",
            rule="the run directory must be writable and have room",
            remedy="free some space (or mend the permissions) and start the same command again; "
            "what was complete before is unharmed",
        )
    )


def full_disk_error(path: Path, failure: str) -> DataError | None:
    """The error for processes that failed because the disk is full; None where it is not.

    Libraries that write checkpoints turn ENOSPC into errors of their own, and on a full
    disk a log may end before it names the cause: so the file system is asked too.

    Args:
        path: A directory that they wrote into.
        failure: What their log says.
    """
    said = any(os.strerror(number) in failure or f"[Errno {number}]" in failure for number in _FULL)
    if said or _is_full(path):
        return storage_error(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    return None


def _is_full(path: Path) -> bool:
    try:
        status = os.statvfs(path)
    except OSError:
        return False
    out_of_files = status.f_files > 0 and status.f_favail == 0
    return status.f_bavail * status.f_frsize < _MIN_FREE_BYTES or out_of_files
