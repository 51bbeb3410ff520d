"""What a disk that is full, gone or read-only has to say."""

from __future__ import annotations

from pathlib import Path

from nemo_spin.errors import DataError, explain


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
