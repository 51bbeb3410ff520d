"""Writes blocks of tensors where they belong in files that others write to as well."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nemo_spin.bridge.safetensors_format import StoredTensor

_SYNC_BYTES = 64 << 20  # written between two starts of the background synchronisation


class BlockWriter:
    """Writes blocks at byte offsets; after a first error nothing more, but without raising.

    The other ranks of a tensor-parallel group may be waiting for this one in a collective,
    so the error is raised when all blocks are through.

    A thread makes durable what is written while more is being written: the kernel would begin
    when gigabytes have gathered, or at the end, and the disk would wait until then.

    Args:
        directory: Where the files are.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._descriptors: dict[str, int] = {}
        self._error: OSError | None = None
        self._unsynced = 0
        self._ending = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._keep_synced, name="sync", daemon=True)
        self._thread.start()

    def attempt(self, action: Callable[[], None]) -> None:
        """Does it, unless something failed before."""
        if self._error is None:
            try:
                action()
            except OSError as error:
                self._error = error

    def write(self, target: StoredTensor, first_row: int, bits: np.ndarray) -> None:
        """Writes whole rows of a tensor, `bits` being of its item size: [rows, ...].

        Raises:
            OSError: The disk is full or failed.
        """
        name = target.file.name
        if name not in self._descriptors:
            self._descriptors[name] = os.open(self._directory / name, os.O_WRONLY)
        row_bytes = target.size // target.shape[0]
        position = target.offset + first_row * row_bytes
        rest = memoryview(bits.data).cast("B")
        while rest:
            written = os.pwrite(self._descriptors[name], rest, position)
            rest, position = rest[written:], position + written
            self._unsynced += written
        if self._unsynced >= _SYNC_BYTES:
            self._unsynced = 0
            self._wake.set()

    def _keep_synced(self) -> None:
        while self._wake.wait() and not self._ending:
            self._wake.clear()
            for descriptor in list(self._descriptors.values()):
                # An error is reported to one caller only, so this one must keep it.
                self.attempt(functools.partial(os.fdatasync, descriptor))

    def close(self) -> None:
        """Makes what was written durable.

        Raises:
            OSError: The first error.
        """
        self._ending = True
        self._wake.set()
        self._thread.join()
        for descriptor in self._descriptors.values():
            self.attempt(functools.partial(os.fsync, descriptor))
            os.close(descriptor)
        if self._error is not None:
            raise self._error
