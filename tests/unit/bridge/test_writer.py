from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from nemo_spin.bridge import writer
from nemo_spin.bridge.safetensors_format import StoredTensor
from nemo_spin.bridge.writer import BlockWriter


def target(directory: Path, *, rows: int, columns: int, offset: int = 16) -> StoredTensor:
    return StoredTensor(directory / "w", "F32", (rows, columns), offset, rows * columns * 4)


def test_blocks_land_where_their_rows_belong(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"\xff" * (16 + 6 * 2 * 4))
    values = np.arange(12, dtype=np.int32).reshape(6, 2)
    blocks = BlockWriter(tmp_path)
    for first in (4, 0, 2):
        blocks.write(target(tmp_path, rows=6, columns=2), first, values[first : first + 2])
    blocks.close()
    assert (tmp_path / "w").read_bytes() == b"\xff" * 16 + values.tobytes()


def test_what_is_written_becomes_durable_while_more_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "w").write_bytes(b"")
    synced: list[int] = []
    monkeypatch.setattr(writer, "_SYNC_BYTES", 64)
    monkeypatch.setattr(os, "fdatasync", synced.append)  # the moment is what is looked at, not the disk
    blocks = BlockWriter(tmp_path)
    for row in range(200):
        blocks.write(target(tmp_path, rows=200, columns=8), row, np.zeros((1, 8), np.int32))
    end = time.monotonic() + 30  # a busy machine gives the other thread its turn late
    while not synced and time.monotonic() < end:
        time.sleep(0.001)
    blocks.close()
    assert synced


def test_the_first_error_is_raised_at_the_end_and_stops_the_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "w").write_bytes(b"")
    monkeypatch.setattr(writer, "_SYNC_BYTES", 1)
    monkeypatch.setattr(os, "fdatasync", fails)  # stands for a disk that reports late that it is full
    blocks = BlockWriter(tmp_path)
    done = []
    blocks.attempt(lambda: blocks.write(target(tmp_path, rows=1, columns=8), 0, np.zeros((1, 8), np.int32)))
    while blocks._error is None:
        pass
    blocks.attempt(lambda: done.append(1))
    with pytest.raises(OSError, match="No space left"):
        blocks.close()
    assert not done
