from __future__ import annotations

import os
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


def test_the_kernel_is_told_of_every_block_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w").write_bytes(b"")
    told: list[tuple[int, ...]] = []
    assert writer._sync_file_range is not None, "Linux has it"
    monkeypatch.setattr(writer, "_sync_file_range", lambda _, *what: told.append(what))
    blocks = BlockWriter(tmp_path)
    for row in range(2):
        blocks.write(target(tmp_path, rows=2, columns=8), row, np.zeros((1, 8), np.int32))
    assert told == [(16, 32, 2), (48, 32, 2)]
    blocks.close()


def test_a_disk_that_reports_late_that_it_is_full_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "w").write_bytes(b"")
    blocks = BlockWriter(tmp_path)
    blocks.write(target(tmp_path, rows=1, columns=8), 0, np.zeros((1, 8), np.int32))
    monkeypatch.setattr(os, "fsync", fails)  # stands for such a disk
    with pytest.raises(OSError, match="No space left"):
        blocks.close()


def test_the_first_error_is_raised_at_the_end_and_stops_the_writing(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"")
    blocks = BlockWriter(tmp_path)
    done = []
    missing = StoredTensor(tmp_path / "x", "F32", (1, 8), 16, 32)
    blocks.attempt(lambda: blocks.write(missing, 0, np.zeros((1, 8), np.int32)))
    blocks.attempt(lambda: done.append(1))
    with pytest.raises(OSError, match="No such file"):
        blocks.close()
    assert not done
