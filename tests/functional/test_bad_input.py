"""Every mistake a user can make ends in exit code 2 and a few lines: key or file, value, rule, remedy."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.functional.commands import VLLM_PYTHON, nemo_spin, write_config
from tests.functional.conftest import TinyData

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def values(tiny_model: Path, tiny_data: TinyData, tmp_path: Path) -> dict[str, Any]:
    return {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tiny_model), "global_batch_size": 8},
        "spin": {"iterations": 2},
        "data": {"train": str(tiny_data.train), "max_prompt_length": 64, "num_workers": 1},
        "generation": {"python": VLLM_PYTHON, "max_tokens": 16},
    }


@pytest.fixture
def refused(values: dict[str, Any], tmp_path: Path) -> Callable[..., str]:
    """Runs a command with overrides; it must be refused the way every mistake is."""

    def run(*overrides: str, command: str = "run") -> str:
        config = write_config(tmp_path / "config.yaml", values)
        result = nemo_spin(command, "--config", str(config), *overrides)
        message = result.stderr
        assert result.returncode == 2, message + result.stdout
        assert "Traceback" not in message
        assert "rule:" in message and "remedy:" in message
        assert len(message.splitlines()) <= 12, message
        return message

    return run


def test_an_unknown_key(refused: Callable[..., str]) -> None:
    message = refused("spin.betta=0.1")
    assert "spin.betta" in message and "spin.beta" in message


def test_a_list_of_the_wrong_length(refused: Callable[..., str]) -> None:
    message = refused("spin.beta=[0.1,0.1,5.0]")
    assert "spin.beta" in message and "3" in message and "2" in message


@pytest.mark.parametrize(
    ("size", "what"), [(3, "attention heads"), (4, "key/value heads")], ids=["heads", "kv-heads"]
)
def test_a_tensor_parallel_size_that_does_not_divide(
    refused: Callable[..., str], size: int, what: str
) -> None:
    message = refused(f"model.tensor_model_parallel_size={size}", f"trainer.devices={size}")
    assert f"model.tensor_model_parallel_size: {size} does not divide" in message and what in message


def test_ranks_that_the_parallel_sizes_do_not_divide(refused: Callable[..., str]) -> None:
    assert "does not divide the 3 ranks" in refused(
        "trainer.devices=3", "model.pipeline_model_parallel_size=2"
    )


def test_a_missing_model_directory(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "there is no such directory" in refused(f"model.path={tmp_path / 'nowhere'}")


def test_truncated_weights(refused: Callable[..., str], tiny_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "model")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert str(weights) in refused(f"model.path={copy}")


def test_a_tokenizer_without_a_chat_template(
    refused: Callable[..., str], tiny_model: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "model")
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    path = copy / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("chat_template", None)
    path.write_text(json.dumps(settings))
    message = refused(f"model.path={copy}")
    assert "data.prompt_template" in message and "chat template" in message


def test_an_empty_dataset(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl" in refused(f"data.train={tmp_path / 'empty.jsonl'}")


def test_a_missing_dataset(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "nothing.jsonl" in refused(f"data.train={tmp_path / 'nothing.jsonl'}")


def test_a_column_that_is_not_there(refused: Callable[..., str]) -> None:
    message = refused("data.messages_column=conversation")
    assert "conversation" in message and "messages" in message


def test_too_many_refused_rows(
    refused: Callable[..., str], values: dict[str, Any], tiny_data: TinyData, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    rows = tiny_data.train.read_text().splitlines()
    empty = json.dumps({"messages": [{"role": "user", "content": "?"}]})
    bad.write_text("\n".join([*rows[:20], *[empty] * 20]) + "\n")
    message = refused(f"data.train={bad}")
    assert "data.max_quarantined_share" in message
    assert (Path(values["run_dir"]) / "data" / "quarantine.parquet").is_file()


def test_a_corrupted_manifest_names_itself_and_leaves_the_rest(
    refused: Callable[..., str], values: dict[str, Any], tmp_path: Path
) -> None:
    config = write_config(tmp_path / "config.yaml", values)
    assert nemo_spin("prepare", "--config", str(config)).returncode == 0
    data = Path(values["run_dir"]) / "data"
    (data / "manifest.json").write_text("{cut")
    assert str(data / "manifest.json") in refused()
    assert (data / "train.parquet").is_file(), "nothing of an earlier stage is lost"
