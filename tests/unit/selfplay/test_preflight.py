from __future__ import annotations

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


def test_a_hub_id_in_the_cache_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert find_model("org/name") == snapshot.resolve()


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="could not be downloaded") as caught:
        find_model("org/name")
    assert len(str(caught.value).splitlines()) < 8
