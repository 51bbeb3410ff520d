"""Files that are either whole or not there, and the manifests that say so.

Everything a stage leaves behind is written beside its place, synced and renamed, so
that a killed process, a full disk or a power cut never leaves half a file under a
final name. A stage's manifest is written last and lists every file with its size and
sha256: the stage is done exactly if the manifest is there and holds.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemo_spin.errors import DataError, explain

MANIFEST_NAME = "manifest.json"
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # of file systems that know no hard links


def sync_directory(directory: Path) -> None:
    """Makes renames inside `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Makes the bytes of `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_path(path: Path, *, first_wins: bool = False) -> Iterator[Path]:
    """Yields a path beside `path` to write to; renames it into place on success.

    Args:
        path: The file.
        first_wins: A file that is there by then stays as it is, whoever wrote it.

    Raises:
        DataError: The disk is full. Nothing under `path` was changed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.partial")
    try:
        yield partial
        sync_file(partial)
        if first_wins:
            _link(partial, path)
        else:
            os.replace(partial, path)
        sync_directory(path.parent)
    except OSError as error:
        raise _storage_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _link(partial: Path, path: Path) -> None:
    """Gives `partial` the name `path` unless that is taken."""
    try:
        os.link(partial, path)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if not path.exists():
            os.replace(partial, path)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields a new directory beside `path`; renames it into place on success.

    Every file is synced first. An existing `path` is replaced only after the new
    directory is complete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        for entry in partial.rglob("*"):
            if entry.is_file():
                sync_file(entry)
        sync_directory(partial)
        if path.exists():
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.replace(path, old)
            os.replace(partial, path)
            shutil.rmtree(old)
        else:
            os.replace(partial, path)
        sync_directory(path.parent)
    except OSError as error:
        raise _storage_error(path, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _storage_error(path: Path, error: OSError) -> DataError:
    return DataError(
        explain(
            str(path),
            found=f"could not be written ({error.strerror or error})",
            rule="the run directory must be writable and have room",
            remedy="free some space (or mend the permissions) and start the same command again; "
            "what was complete before is unharmed",
        )
    )


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by `text` (UTF-8), atomically."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` by `value` as JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def remove_partials(directory: Path) -> None:
    """Removes what killed writers left beside their places in `directory`."""
    for entry in [*directory.glob(".*.partial"), *directory.glob(".*.old")]:
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """Hex sha256 of the bytes of `path`."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """Hex sha256 of `text` as UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_files(paths: list[Path]) -> dict[Path, str]:
    """Hex sha256 of every file, several at a time (hashing releases the GIL)."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(paths, pool.map(sha256_file, paths), strict=True))


@dataclass
class Manifest:
    """What a finished stage left behind, and from what.

    Attributes:
        stage: Name of the stage.
        inputs: What the result depends on: hashes of files (strings) and the part of
            the configuration that matters (a mapping). Compared on every start.
        files: Relative path -> `{"size": bytes, "sha256": hex}`.
        counts: Row and token counts and other results worth showing.
        notes: How it came about, such as times: nothing depends on it.
    """

    stage: str
    inputs: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def sha256(self) -> str:
        """One hash for the contents of all files (not for how they came about)."""
        return sha256_text(json.dumps({k: v["sha256"] for k, v in self.files.items()}, sort_keys=True))


def write_manifest(
    directory: Path,
    *,
    stage: str,
    files: list[str],
    inputs: Mapping[str, Any],
    counts: Mapping[str, Any],
    hashes: Mapping[str, str] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Manifest:
    """Hashes `files` (relative to `directory`) and writes the manifest, last of all.

    Args:
        directory: Where the files are, and the manifest will be.
        stage: Name of the stage.
        files: All files that belong to it.
        inputs: See `Manifest`.
        counts: See `Manifest`.
        hashes: sha256 of those files that were hashed already.
        notes: See `Manifest`.
    """
    known = dict(hashes or {})
    hashed = sha256_files([directory / name for name in files if name not in known])
    known |= {path.relative_to(directory).as_posix(): digest for path, digest in hashed.items()}
    manifest = Manifest(
        stage=stage,
        inputs=dict(inputs),
        counts=dict(counts),
        notes=dict(notes or {}),
        files={
            name: {
                "size": (directory / name).stat().st_size,
                "sha256": known[name],
            }
            for name in sorted(files)
        },
    )
    write_json(directory / MANIFEST_NAME, asdict(manifest))
    return manifest


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of `directory`, or None where the stage has not finished.

    Raises:
        DataError: The manifest is there but is not one.
    """
    path = directory / MANIFEST_NAME
    try:
        return Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, UnicodeDecodeError) as error:
        raise DataError(
            explain(
                str(path),
                found=f"is not a manifest ({error})",
                rule="a manifest is the JSON object that a finished stage writes",
                remedy=f"remove {directory} and start the same command again: the stage is redone",
            )
        ) from error


def verify_manifest(directory: Path, manifest: Manifest) -> None:
    """Checks that every file of the manifest is there with its size and sha256.

    Raises:
        DataError: A file is missing, or differs.
    """
    for name, entry in manifest.files.items():
        path = directory / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry["size"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise _damaged(directory, path, f"{found}; {entry['size']} bytes were written")
    for path, digest in sha256_files([directory / name for name in manifest.files]).items():
        expected = manifest.files[str(path.relative_to(directory))]["sha256"]
        if digest != expected:
            raise _damaged(directory, path, f"has sha256 {digest[:12]}…; {expected[:12]}… was written")


def _damaged(directory: Path, path: Path, found: str) -> DataError:
    return DataError(
        explain(
            str(path),
            found=found,
            rule="a finished stage's files never change",
            remedy=f"restore the file, or remove {directory} and start the same command again: "
            "the stage is redone",
        )
    )
