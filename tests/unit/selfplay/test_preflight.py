from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nemo_spin.errors import CheckpointError
from nemo_spin.selfplay.preflight import find_model


def test_a_directory_is_itself(tmp_path: Path) -> None:
    link = tmp_path / "link"
    (tmp_path / "model").mkdir()
    link.symlink_to("model")
    assert find_model(str(link)) == (tmp_path / "model").resolve()


def test_a_home_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert find_model("~/model") == (tmp_path / "model").resolve()


@pytest.mark.parametrize("path", ["/no/such/model", "./models/a", "../b", "a/b/c", "model"])
def test_a_path_that_is_not_there_is_no_hub_id(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"there is no such directory(.|\n)*hub id"):
        find_model(path)


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        find_model(str(tmp_path / "model.safetensors"))


@pytest.fixture
def snapshot(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model org/name in a cache of the hub, which cannot be reached."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_model, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return snapshot


def test_a_hub_id_in_the_cache_needs_no_network(snapshot: Path) -> None:
    assert find_model("org/name") == snapshot.resolve()


@pytest.mark.parametrize(
    ("pattern", "words"),
    [("*.safetensors", "whole set of weights"), ("config.json", "config.json"), ("*token*", "tokenizer")],
)
def test_a_part_of_a_model_in_the_cache_is_none(snapshot: Path, pattern: str, words: str) -> None:
    removed = [path.rename(snapshot.parent / path.name) for path in snapshot.glob(pattern)]
    assert removed
    for path in [*snapshot.glob("chat_template*"), *snapshot.glob("special_*")]:
        path.unlink()
    with pytest.raises(CheckpointError, match=f"there is no {words} on the hub"):
        find_model("org/name")


def test_the_rest_of_a_model_is_downloaded(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = (snapshot / "model.safetensors").rename(snapshot.parent / "elsewhere")

    def hub(hub_id: str, *, allow_patterns: list[str], local_files_only: bool = False) -> str:
        """Stands in for the hub, which no test may ask."""
        assert hub_id == "org/name" and "*.safetensors" in allow_patterns
        if not local_files_only:
            weights.rename(snapshot / "model.safetensors")
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    for _ in range(2):  # the second time from the cache: nothing is left to be moved
        assert find_model("org/name") == snapshot.resolve()
        assert (snapshot / "model.safetensors").is_file()


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="could not be downloaded") as caught:
        find_model("org/name")
    assert len(str(caught.value).splitlines()) < 8
