"""The record of a checkpoint: what was written, known without reading it again."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from nemo_spin.data.files import read_manifest, sha256_file, verify_manifest, write_manifest
from nemo_spin.errors import DataError
from nemo_spin.megatron.checkpoint_files import (
    RECORD_NAME,
    checkpoint_path,
    damage,
    recorded_hashes,
    write_record,
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = checkpoint_path(tmp_path / "train" / "checkpoints", 3)
    path.mkdir(parents=True)
    for name in ("__0_0.distcp", "__1_0.distcp"):
        (path / name).write_text(f"weights of {name}")
    write_record(path, {})
    return path


def test_the_record_gives_the_hashes_of_all_files_but_its_own(tmp_path: Path, checkpoint: Path) -> None:
    train = tmp_path / "train"
    assert recorded_hashes(checkpoint, under=train) == {
        f"checkpoints/step-00000003/{name}": sha256_file(checkpoint / name)
        for name in ("__0_0.distcp", "__1_0.distcp")
    }


def test_bytes_that_changed_since_are_found_with_the_hashes_of_when_they_were_written(
    tmp_path: Path, checkpoint: Path
) -> None:
    train = tmp_path / "train"
    (checkpoint / "__1_0.distcp").write_text("weights of __1_0.distcq")
    files = [path.relative_to(train).as_posix() for path in checkpoint.iterdir()]
    hashes = recorded_hashes(checkpoint, under=train)
    write_manifest(train, stage="train", files=files, inputs={}, counts={}, hashes=hashes)
    manifest = read_manifest(train)
    assert manifest is not None
    assert set(manifest.files) == set(files)
    with pytest.raises(DataError, match="__1_0"):
        verify_manifest(train, manifest)


def test_a_file_of_another_size_is_not_known(tmp_path: Path, checkpoint: Path) -> None:
    (checkpoint / "__1_0.distcp").write_text("half")
    assert [Path(name).name for name in recorded_hashes(checkpoint, under=tmp_path)] == ["__0_0.distcp"]


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"files": [1]}', '{"files": {"a": 1}}'])
def test_without_a_record_nothing_is_known(tmp_path: Path, checkpoint: Path, content: str | None) -> None:
    (checkpoint / "a").touch()
    if content is None:
        (checkpoint / RECORD_NAME).unlink()
    else:
        (checkpoint / RECORD_NAME).write_text(content)
    assert recorded_hashes(checkpoint, under=tmp_path) == {}


@pytest.mark.parametrize("name", ["__1_0.distcp", RECORD_NAME])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES])
def test_a_storage_that_does_not_answer_is_no_damage(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    """Stands in for a file system whose server is away: opening a file gives its error."""
    opened = Path.open

    def away(path: Path, *arguments: Any, **keywords: Any) -> Any:
        if path.name == name:
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", away)
    with pytest.raises(DataError) as caught:
        damage(checkpoint)
    assert f"{checkpoint / name}: could not be read ({os.strerror(number)})" in str(caught.value)


@pytest.mark.parametrize("name", ["__1_0.distcp", RECORD_NAME])
def test_what_is_missing_is_damage(checkpoint: Path, name: str) -> None:
    assert damage(checkpoint) is None
    (checkpoint / name).unlink()
    assert damage(checkpoint, part=0, parts=2) == (
        None if name != RECORD_NAME else "files.json cannot be read (FileNotFoundError)"
    ), "the other rank's file"
    assert "cannot be read" in str(damage(checkpoint, part=1, parts=2))


def test_the_record_has_sizes_and_hashes(checkpoint: Path) -> None:
    files = json.loads((checkpoint / RECORD_NAME).read_text())["files"]
    assert files["__0_0.distcp"] == {"size": 23, "sha256": sha256_file(checkpoint / "__0_0.distcp")}
