"""What lies in a .nemo file comes out again, and nothing that it should not hold."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from nemo_spin.errors import CheckpointError
from nemo_spin.model.nemo_archive import pack, unpack


def test_round_trip(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "model_weights").mkdir(parents=True)
    (source / "model_config.yaml").write_text("job: {}\n")
    (source / "model_weights" / ".metadata").write_bytes(b"\x80\x04")
    pack(source, tmp_path / "model.nemo")
    with tarfile.open(tmp_path / "model.nemo", "r:") as tar:
        assert tar.getnames() == ["./model_config.yaml", "./model_weights", "./model_weights/.metadata"]
    unpack(tmp_path / "model.nemo", tmp_path / "out")
    assert (tmp_path / "out" / "model_config.yaml").read_text() == "job: {}\n"
    assert (tmp_path / "out" / "model_weights" / ".metadata").read_bytes() == b"\x80\x04"


def test_a_compressed_archive(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").write_text("a")
    pack(tmp_path / "source", tmp_path / "plain.nemo")
    (tmp_path / "model.nemo").write_bytes(gzip.compress((tmp_path / "plain.nemo").read_bytes()))
    unpack(tmp_path / "model.nemo", tmp_path / "out")
    assert (tmp_path / "out" / "a").read_text() == "a"


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    "unsafe",
    [
        member("../outside"),
        member("/absolute"),
        member("a/../../outside"),
        member("link", tarfile.SYMTYPE, "/etc"),
        member("hard", tarfile.LNKTYPE, "../outside"),
        member("pipe", tarfile.FIFOTYPE),
    ],
    ids=lambda info: info.name,
)
def test_unsafe_members_are_refused(tmp_path: Path, unsafe: tarfile.TarInfo) -> None:
    archive, out = tmp_path / "model.nemo", tmp_path / "here" / "out"
    with tarfile.open(archive, "w:") as tar:
        tar.addfile(unsafe, io.BytesIO(b""))
    out.mkdir(parents=True)
    with pytest.raises(CheckpointError, match="member"):
        unpack(archive, out)
    assert list(out.iterdir()) == [] and list((tmp_path / "here").iterdir()) == [out]


def test_what_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "model.nemo").write_bytes(b"weights")
    with pytest.raises(CheckpointError, match=r"not a \.nemo archive"):
        unpack(tmp_path / "model.nemo", tmp_path)
