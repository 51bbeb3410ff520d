from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_spin.config.schema import DataConfig
from nemo_spin.data.inputs import prepare_inputs, tokenizer_hashes
from nemo_spin.errors import ConfigError, DataError
from tests.unit.data.tokenizers import conversations, save_tokenizer, write_jsonl, write_parquet


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    return save_tokenizer(tmp_path / "tokenizer")


def test_only_what_can_change_a_byte_counts(tmp_path: Path, tokenizer_dir: Path) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", conversations(3))
    base = prepare_inputs(DataConfig(train=str(data)), tokenizer_dir)
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(data.read_bytes())
    same = DataConfig(train=str(moved), num_workers=7, max_quarantined_share=0.5, train_split="x")
    assert prepare_inputs(same, tokenizer_dir) == base
    assert json.loads(json.dumps(base)) == base  # as a manifest gives it back
    changes: list[dict[str, Any]] = [
        {"heldout": str(data)},
        {"format": "spin"},
        {"prompt_template": "{prompt}"},
        {"max_prompt_length": 9},
        {"max_rows": 1},
        {"id_column": "id"},
        {"chat_template_kwargs": {"a": 1}},
    ]
    for change in changes:
        assert prepare_inputs(DataConfig(train=str(data), **change), tokenizer_dir) != base, change
    write_jsonl(data, conversations(4))
    assert prepare_inputs(DataConfig(train=str(data)), tokenizer_dir) != base


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "generation_config.json"])
def test_tokenizer_template_and_stop_ids_count(tmp_path: Path, tokenizer_dir: Path, name: str) -> None:
    before = tokenizer_hashes(tokenizer_dir)
    (tokenizer_dir / name).write_text("{}")
    assert tokenizer_hashes(tokenizer_dir) != before
    (tokenizer_dir / "model.safetensors").write_text("weights do not count")
    assert "model.safetensors" not in tokenizer_hashes(tokenizer_dir)


def test_directories_count_by_their_files_and_hub_ids_by_name(tmp_path: Path, tokenizer_dir: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write_parquet(folder / "train.parquet", conversations(2))
    config = DataConfig(train=str(folder))
    before = prepare_inputs(config, tokenizer_dir)["train"]
    assert prepare_inputs(config, tokenizer_dir)["train"] == before
    write_parquet(folder / "more.parquet", conversations(1))
    assert prepare_inputs(config, tokenizer_dir)["train"] != before
    hub = prepare_inputs(DataConfig(train="org/name", revision="abc"), tokenizer_dir)["train"]
    assert hub == {"hub": "org/name", "split": "train", "subset": None, "revision": "abc"}


def test_missing_files_and_tokenizers(tmp_path: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(DataError, match=r"data\.heldout=gone\.jsonl"):
        prepare_inputs(DataConfig(train="org/name", heldout="gone.jsonl"), tokenizer_dir)
    with pytest.raises(ConfigError, match="is not a directory"):
        prepare_inputs(DataConfig(train="org/name"), tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        prepare_inputs(DataConfig(train="org/name"), tmp_path / "empty")
