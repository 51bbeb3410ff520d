"""Hashes every file of a run once, and again only when it was touched.

A finished run may hold a terabyte of checkpoints, and `run` on it must answer within
seconds. So the sha256 of a file that was verified is remembered with the file's size,
inode and change time (which the kernel sets at every write and nobody can set back), as
git does in its index. A run directory that was copied elsewhere is hashed again.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nemo_spin.data.files import Manifest, read_manifest, verify_manifest, write_json
from nemo_spin.errors import NemoSpinError

Stamp = list[int]


class Verified:
    """Remembers what was verified, for one command and for the next.

    Args:
        path: Where to remember it. A file that cannot be read is as good as none.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, list[str | Stamp]] = {}
        self._seen: dict[Path, Manifest] = {}
        try:
            self._known = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            self._known = {}

    def manifest(self, directory: Path) -> Manifest | None:
        """The manifest of `directory`, its files verified; None where the stage has not finished.

        A directory is looked at once per command.

        Raises:
            DataError: The manifest or one of its files is damaged.
        """
        if directory in self._seen:
            return self._seen[directory]
        manifest = read_manifest(directory)
        if manifest is None:
            return None
        to_hash = {
            name: entry
            for name, entry in manifest.files.items()
            if self._known.get(str(directory / name)) != [entry["sha256"], _stamp(directory / name)]
        }
        if to_hash:
            # The stamps first: a write that happens while hashing must not go unseen later.
            stamps = {name: _stamp(directory / name) for name in to_hash}
            verify_manifest(directory, replace(manifest, files=to_hash))
            for name, entry in to_hash.items():
                self._known[str(directory / name)] = [entry["sha256"], stamps[name] or []]
            self._save()
        self._seen[directory] = manifest
        return manifest

    def trust(self, directory: Path) -> Manifest | None:
        """The manifest of a stage that ended just now: its files were hashed as they were written."""
        manifest = read_manifest(directory)
        if manifest is not None:
            for name, entry in manifest.files.items():
                self._known[str(directory / name)] = [entry["sha256"], _stamp(directory / name) or []]
            self._save()
            self._seen[directory] = manifest
        return manifest

    def weights_sha256(self, model_dir: Path, compute: Callable[[Path], str]) -> str:
        """`compute(model_dir)`, unless no file of the directory was touched since the last time."""
        return self._unless_untouched("weights", model_dir, compute)

    def sound(self, model_dir: Path, check: Callable[[Path], object]) -> None:
        """`check(model_dir)`, unless it passed before and no file of the directory was touched since.

        Raises:
            NemoSpinError: What the check raises; then nothing is remembered.
        """

        def passed(_: Path) -> str:
            check(model_dir)
            return "passed"

        self._unless_untouched("sound", model_dir, passed)

    def _unless_untouched(self, what: str, model_dir: Path, compute: Callable[[Path], str]) -> str:
        directory = model_dir.resolve()
        stamps: Stamp = [
            number
            for path in sorted(directory.iterdir())
            if path.is_file()
            for number in (_stamp(path) or [])
        ]
        key = f"{what}:{directory}"
        known = self._known.get(key)
        if known is not None and known[1] == stamps:
            return str(known[0])
        digest = compute(directory)
        self._known[key] = [digest, stamps]
        self._save()
        return digest

    def _save(self) -> None:
        with contextlib.suppress(NemoSpinError):  # a full disk: then it is hashed again the next time
            write_json(self._path, self._known)


def _stamp(path: Path) -> Stamp | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_size, status.st_ino, status.st_ctime_ns, status.st_mtime_ns]
