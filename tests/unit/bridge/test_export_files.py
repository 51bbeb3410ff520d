"""What an export consists of beside its values."""

import ctypes
import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_spin.bridge import export_files
from nemo_spin.bridge.checkpoint_files import open_checkpoint
from nemo_spin.bridge.export_files import (
    base_model,
    create_files,
    model_card,
    plan_export,
)
from nemo_spin.bridge.families import architecture_of, family_of
from nemo_spin.data.files import write_manifest
from tests.unit.bridge.checkpoints import make_checkpoint

SHAPES = {"a": (10, 4), "b": (3,), "c": (10, 4), "d": (100, 2), "e": (1,)}


@contextmanager
def small_files_only() -> Iterator[None]:
    """No file may grow beyond 4 KB, as on a disk that is full; nor may pytest's own output meanwhile."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_tensors_fill_files_in_their_order_up_to_the_bound() -> None:
    # In F32: a 160, b 12, c 160, d 800 (alone beyond the bound), e 4 bytes.
    plan = plan_export(SHAPES, dtype="F32", max_shard_bytes=172)
    assert [[n for n, place in plan.places.items() if place.file.name == f] for f in plan.files] == [
        ["a", "b"],
        ["c"],
        ["d"],
        ["e"],
    ]
    assert list(plan.files) == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert plan.index is not None
    assert plan.index["metadata"] == {"total_size": 1136}
    assert plan.index["weight_map"]["d"] == "model-00003-of-00004.safetensors"


def test_one_file_needs_no_index() -> None:
    plan = plan_export(SHAPES, dtype="BF16", max_shard_bytes=568)
    assert (list(plan.files), plan.index) == (["model.safetensors"], None)


@pytest.mark.parametrize("max_shard_bytes", [400, 10**9])
def test_created_files_are_complete_checkpoints_of_the_right_size(
    tmp_path: Path, max_shard_bytes: int
) -> None:
    create_files(plan_export(SHAPES, dtype="F32", max_shard_bytes=max_shard_bytes), tmp_path)
    assert {name: stored.shape for name, stored in open_checkpoint(tmp_path).tensors.items()} == SHAPES


def test_room_is_reserved_before_anything_is_written(tmp_path: Path) -> None:
    plan = plan_export({"a": (64, 64)}, dtype="F32", max_shard_bytes=10**9)
    with small_files_only(), pytest.raises(OSError, match="File too large"):
        create_files(plan, tmp_path)


@pytest.fixture
def no_reserving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for a file system without fallocate, such as NFS 4.0, by its answer alone."""

    def unsupported(*_: int) -> int:
        ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    monkeypatch.setattr(export_files, "_fallocate", unsupported)


@pytest.mark.usefixtures("no_reserving")
def test_where_no_room_can_be_reserved_nothing_is_written_for_it(tmp_path: Path) -> None:
    plan = plan_export({"a": (4096, 4096), "b": (1024, 4096)}, dtype="F32", max_shard_bytes=64 << 20)
    create_files(plan, tmp_path)
    for name, file in plan.files.items():
        status = (tmp_path / name).stat()
        assert status.st_size == file.size
        assert status.st_blocks * 512 <= 64 << 10, "the header alone"
    assert set(open_checkpoint(tmp_path).tensors) == {"a", "b"}


@pytest.mark.usefixtures("no_reserving")
@pytest.mark.parametrize(("blocks", "raised"), [(10**6, "No space left"), (0, None)])
def test_where_none_can_be_reserved_the_file_system_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int, raised: str | None
) -> None:
    plan = plan_export({"a": (64, 64), "b": (64, 64)}, dtype="F32", max_shard_bytes=20_000)
    answer = SimpleNamespace(f_blocks=blocks, f_bavail=8, f_frsize=4096)  # one of two files
    monkeypatch.setattr(os, "statvfs", lambda _: answer)
    if raised is None:  # it does not know itself
        create_files(plan, tmp_path)
    else:
        with pytest.raises(OSError, match=raised):
            create_files(plan, tmp_path)


def test_the_order_is_that_of_the_table(tmp_path: Path) -> None:
    architecture = architecture_of(make_checkpoint(tmp_path, "qwen2"))
    names = list(family_of(architecture).stored_shapes(architecture))
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers)


def test_the_card_lists_the_facts(tmp_path: Path) -> None:
    architecture = architecture_of(make_checkpoint(tmp_path))
    card = model_card(
        architecture,
        dtype="BF16",
        num_parameters=1234567,
        extra={
            "base_model": "org/model: 2",
            "iteration": 1,
            "note": "a|b\nc",
            "settings": {"spin.beta": 0.1, "spin.loss": "logistic"},
            "metrics": {},
        },
    )
    assert card.startswith('---\nbase_model: "org/model: 2"\n')
    for line in (
        "| parameters | 1,234,567 |",
        "| iteration | 1 |",
        "| note | a\\|b c |",
        "| weights | bfloat16 |",
        "| spin.beta | 0.1 |",
        "| spin.loss | logistic |",
    ):
        assert line in card.splitlines()
    assert card.index("| iteration") < card.index("\n\n## Settings\n\n| | |\n|---|---|\n| spin.beta")
    assert "Metrics" not in card


def test_the_card_speaks_of_self_play_only_where_there_was_some(tmp_path: Path) -> None:
    architecture = architecture_of(make_checkpoint(tmp_path))
    cards = [
        model_card(architecture, dtype="F32", num_parameters=1, extra={"iteration": iteration})
        for iteration in (0, None)
    ]
    assert ["self-play" in card for card in cards] == [True, False]
    assert "iteration" not in cards[1]


def test_the_base_model_is_named_without_its_place(tmp_path: Path) -> None:
    snapshot = make_checkpoint(tmp_path / "models--org--name" / "snapshots" / "0abc")
    os.symlink(snapshot, tmp_path / "opponent")
    assert base_model(tmp_path / "opponent") == "org/name"
    plain = make_checkpoint(tmp_path / "my-model")
    assert base_model(plain) == "my-model"


def test_the_base_model_is_inherited_from_an_earlier_export(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    write_manifest(tmp_path, stage="export", files=[], inputs={}, counts={"base_model": "org/first"})
    assert base_model(tmp_path) == "org/first"
