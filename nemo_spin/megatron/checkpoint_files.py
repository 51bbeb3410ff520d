"""Resume checkpoints as directories: their names, and how to tell a whole one from a damaged one.

A directory is named by the optimizer step. An unfinished one keeps a `.partial` name that
no reader looks at; a whole one has a record of all its files with size and sha256, written
last. What does not agree with its record is set aside under a `.damaged` name, and the
checkpoint before it is used.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import distributed

from nemo_spin.data.files import sha256_file, write_json
from nemo_spin.errors import DataError
from nemo_spin.megatron.agreement import from_first_rank
from nemo_spin.megatron.runtime import Runtime, first_rank_writes

RECORD_NAME = "files.json"
_NAME = re.compile(r"step-(\d{8})$")
_PARTIAL = ".partial"
_DAMAGED = ".damaged"
_LACKING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)  # other errors are the storage's


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies."""
    return directory / f"step-{step:08d}"


def partial_path(final: Path) -> Path:
    """Where a checkpoint is written before it is whole."""
    return final.with_name(final.name + _PARTIAL)


def list_checkpoints(directory: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [path for path in directory.glob("step-*") if _NAME.search(path.name) and path.is_dir()]
    return sorted(found)


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest finished checkpoint, or None."""
    found = list_checkpoints(directory)
    return found[-1] if found else None


def keep_newest(directory: Path, count: int) -> None:
    """Removes all but the newest `count` checkpoints."""
    for old in list_checkpoints(directory)[:-count]:
        shutil.rmtree(old)


def remove_unfinished(directory: Path) -> None:
    """Removes what killed writers left behind."""
    for partial in directory.glob(f"step-*{_PARTIAL}"):
        shutil.rmtree(partial, ignore_errors=True)


def file_entry(path: Path) -> dict[str, Any]:
    """Size (bytes) and sha256 of a file."""
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}


def write_record(directory: Path, known: Mapping[str, dict[str, Any]]) -> None:
    """Writes the record of all files in `directory`.

    Args:
        directory: A checkpoint that is complete but for its record.
        known: Entries of files whose bytes need not be read again, by name.
    """
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    files = {name: known.get(name) or file_entry(directory / name) for name in names}
    write_json(directory / RECORD_NAME, {"files": files})


def recorded_hashes(path: Path, *, under: Path) -> dict[str, str]:
    """sha256 of a checkpoint's files as its record has them: hashed when they were written.

    Args:
        path: A whole checkpoint.
        under: What the names are relative to.

    Returns:
        Of files that still have their size; of none where there is no record that can be read.
    """
    try:
        files = json.loads((path / RECORD_NAME).read_text(encoding="utf-8"))["files"]
        return {
            (path / name).relative_to(under).as_posix(): str(entry["sha256"])
            for name, entry in files.items()
            if (path / name).stat().st_size == entry["size"]
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def damage(path: Path, *, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint; None where it agrees with its record.

    Args:
        path: The checkpoint.
        part, parts: Which share of the files to read, for ranks that share the work.

    Raises:
        DataError: The storage does not give what it has; the checkpoint may be sound.
    """
    try:
        return _difference(path, part=part, parts=parts)
    except OSError as error:
        raise DataError(
            f"{error.filename or path}: could not be read ({error.strerror or error}); look at the file "
            "system, on all nodes; the same command goes on where it was"
        ) from error


def _difference(path: Path, *, part: int, parts: int) -> str | None:
    record = path / RECORD_NAME
    try:
        files = json.loads(record.read_text(encoding="utf-8"))["files"]
        entries = [(name, entry["size"], entry["sha256"]) for name, entry in sorted(files.items())]
    except (*_LACKING, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{record.name} cannot be read ({type(error).__name__})"
    for name, size, sha256 in entries[part::parts]:
        try:
            found = (path / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, and had {size}"
            if sha256_file(path / name) != sha256:
                return f"{name} has other bytes than were written"
        except _LACKING as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def newest_whole_checkpoint(directory: Path, *, runtime: Runtime, note: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that agrees with its record. All ranks must call; they share the reading.

    Newer ones that do not are renamed, so that nothing takes them for whole; what killed
    writers left behind is removed.

    Args:
        directory: Where checkpoints lie.
        runtime: This rank's place.
        note: Told of every checkpoint that is set aside.

    Returns:
        Its path, the same on all ranks; None where there is none.
    """

    def newest_first() -> list[Path]:
        remove_unfinished(directory)
        return list_checkpoints(directory)[::-1]

    for path in from_first_rank(newest_first):
        found: list[Any] = [None] * runtime.world_size
        distributed.all_gather_object(found, _damage_of_own_share(path, runtime))
        wrong = next((message for message in found if message is not None), None)
        if wrong is None:
            return path
        with first_rank_writes(runtime) as writes:
            if writes:
                aside = _set_aside(path)
                note(
                    f"{path.name} is damaged ({wrong}); it is now {aside.name}, and the training "
                    "goes on from the checkpoint before it"
                )
    return None


def _damage_of_own_share(path: Path, runtime: Runtime) -> str | None:
    """What is wrong with this rank's share. All ranks must call, and raise what one of them raises."""
    with first_rank_writes(runtime):
        return damage(path, part=runtime.rank, parts=runtime.world_size)


def _set_aside(path: Path) -> Path:
    number = 0
    while (aside := path.with_name(f"{path.name}{_DAMAGED}{f'-{number}' if number else ''}")).exists():
        number += 1
    try:
        path.rename(aside)
    except OSError as error:
        raise DataError(f"{path}: is damaged and cannot be renamed to {aside.name} ({error})") from error
    return aside
