"""Writes blocks of tensors where they belong in files that others write to as well."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nemo_spin.bridge.safetensors_format import StoredTensor

_SYNC_FILE_RANGE_WRITE = 2  # sync_file_range(2): start writing out, do not wait


class BlockWriter:
    """Writes blocks at byte offsets; after a first error nothing more, but without raising.

    The other ranks of a tensor-parallel group may be waiting for this one in a collective,
    so the error is raised when all blocks are through.

    The kernel is told to begin with every block at once: of itself it would when gigabytes have
    gathered, or at the end, and the disk would wait until then.

    Args:
        directory: Where the files are.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._descriptors: dict[str, int] = {}
        self._error: OSError | None = None

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
            start_writing_out(self._descriptors[name], position, written)
            rest, position = rest[written:], position + written

    def close(self) -> None:
        """Makes what was written durable.

        Raises:
            OSError: The first error.
        """
        for descriptor in self._descriptors.values():
            self.attempt(functools.partial(os.fsync, descriptor))
            os.close(descriptor)
        if self._error is not None:
            raise self._error


def start_writing_out(descriptor: int, position: int, size: int) -> None:
    """Has the kernel begin to write these bytes to the disk; where it cannot be told, nothing.

    Errors are not looked at: nothing is durable before `fsync`, which reports them.
    """
    if _sync_file_range is not None:
        _sync_file_range(descriptor, position, size, _SYNC_FILE_RANGE_WRITE)


def _find_sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """The system call of Linux, which Python's `os` does not have."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
        function.restype = ctypes.c_int
    return function


_sync_file_range = _find_sync_file_range()
