from __future__ import annotations

import os
from pathlib import Path

import pytest

from nemo_spin.data import files
from nemo_spin.data.files import write_manifest
from nemo_spin.errors import DataError
from nemo_spin.selfplay.verified import Verified


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed."""
    names: list[str] = []
    original = files.sha256_file

    def sha256_file(path: Path) -> str:
        names.append(path.name)
        return original(path)

    monkeypatch.setattr(files, "sha256_file", sha256_file)
    return names


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "stage"
    directory.mkdir()
    (directory / "a").write_text("aaaa")
    (directory / "b").write_text("bbbb")
    write_manifest(directory, stage="train", files=["a", "b"], inputs={}, counts={})
    return directory


def test_hashes_once_per_command_and_not_in_the_next(
    tmp_path: Path, directory: Path, hashed: list[str]
) -> None:
    verified = Verified(tmp_path / "known")
    for _ in range(2):
        assert verified.manifest(directory) is not None
    assert sorted(hashed) == ["a", "b"]
    hashed.clear()
    assert Verified(tmp_path / "known").manifest(directory) is not None
    assert hashed == []


def test_a_touched_file_is_hashed_again(tmp_path: Path, directory: Path, hashed: list[str]) -> None:
    Verified(tmp_path / "known").manifest(directory)
    hashed.clear()
    os.utime(directory / "a")
    assert Verified(tmp_path / "known").manifest(directory) is not None
    assert hashed == ["a"]


def test_a_changed_file_is_found_even_with_its_old_times(tmp_path: Path, directory: Path) -> None:
    Verified(tmp_path / "known").manifest(directory)
    status = (directory / "a").stat()
    (directory / "a").write_text("axaa")
    os.utime(directory / "a", ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError, match="a: has sha256"):
        Verified(tmp_path / "known").manifest(directory)


def test_a_missing_file_is_found(tmp_path: Path, directory: Path) -> None:
    Verified(tmp_path / "known").manifest(directory)
    (directory / "b").unlink()
    with pytest.raises(DataError, match="b: is missing"):
        Verified(tmp_path / "known").manifest(directory)


def test_what_was_written_just_now_is_not_hashed(tmp_path: Path, directory: Path, hashed: list[str]) -> None:
    assert Verified(tmp_path / "known").trust(directory) is not None
    assert Verified(tmp_path / "known").manifest(directory) is not None
    assert hashed == []


def test_a_stage_that_is_not_done(tmp_path: Path) -> None:
    assert Verified(tmp_path / "known").manifest(tmp_path / "nowhere") is None
    assert Verified(tmp_path / "known").trust(tmp_path / "nowhere") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"x": 1}', '{"x": [1]}', "null"])
def test_a_damaged_memory_is_none(tmp_path: Path, directory: Path, text: str) -> None:
    known = tmp_path / "known"
    known.write_text(text.replace("x", str(directory / "a")))
    assert Verified(known).manifest(directory) is not None
    (directory / "a").write_text("axaa")
    with pytest.raises(DataError):
        Verified(known).manifest(directory)


def test_weights_are_hashed_when_a_file_was_touched(tmp_path: Path, directory: Path) -> None:
    calls: list[Path] = []

    def compute(path: Path) -> str:
        calls.append(path)
        return f"{len(calls):064d}"

    link = tmp_path / "link"
    link.symlink_to(directory)
    assert Verified(tmp_path / "known").weights_sha256(directory, compute) == f"{1:064d}"
    assert Verified(tmp_path / "known").weights_sha256(link, compute) == f"{1:064d}"
    (directory / "a").write_text("changed")
    assert Verified(tmp_path / "known").weights_sha256(directory, compute) == f"{2:064d}"
    (directory / "new").write_text("surplus")
    assert Verified(tmp_path / "known").weights_sha256(directory, compute) == f"{3:064d}"


def test_a_model_is_checked_until_it_passes_and_when_a_file_was_touched(
    tmp_path: Path, directory: Path
) -> None:
    calls: list[Path] = []

    def check(path: Path) -> None:
        calls.append(path)
        if (path / "a").read_text() == "nan":
            raise DataError("not finite")

    def sound() -> None:
        Verified(tmp_path / "known").sound(directory, check)

    sound()
    sound()
    assert calls == [directory]
    (directory / "a").write_text("nan")
    for _ in range(2):
        with pytest.raises(DataError, match="not finite"):
            sound()
    assert len(calls) == 3
    (directory / "a").write_text("good")
    sound()
    sound()
    assert len(calls) == 4
    assert Verified(tmp_path / "known").weights_sha256(directory, lambda _: "another") == "another"
