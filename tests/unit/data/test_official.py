"""Folders of the official code: which files, in which order, and what is made of their rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_spin.config.schema import DataConfig
from nemo_spin.data.official import PAIRS, official_files
from nemo_spin.data.pairs import read_given
from nemo_spin.data.prepare import prepare
from tests import models
from tests.unit.config.test_validate import accepted, refused


def pair(number: int, answer: str) -> dict[str, Any]:
    prompt = {"role": "user", "content": f"Say {number}"}
    texts = {"real": f"It is {number}", "generated": answer}
    return {name: [prompt, {"role": "assistant", "content": text}] for name, text in texts.items()}


def write_losers(folder: Path) -> None:
    """As the official sampler leaves them: eleven parts of two rows, and held-out ones."""
    folder.mkdir()
    for part in range(11):
        rows = [pair(2 * part, "one"), pair(2 * part + 1, "" if part == 10 else " two")]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"loser_{part}.jsonl").write_text(text)
    (folder / "loser_0_test.jsonl").write_text(json.dumps(pair(99, "held out")) + "\n")
    (folder / "loser_notes.jsonl").write_text("")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    models.write_tokenizer(directory)
    return directory


def prepared(folder: Path, model: Path, out: Path, **settings: Any) -> dict[str, pa.Table]:
    config = DataConfig(
        train=str(folder), heldout=str(folder), format="spin", num_workers=1, use_generations=True, **settings
    )
    prepare(config, tokenizer_dir=model, out_dir=out)
    return {split: read_given(out / f"{split}.parquet") for split in ("train", "heldout")}


def test_parts_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    write_losers(tmp_path / "iter0")
    names = [path.name for path in official_files(tmp_path / "iter0", "train")]
    assert names == [f"loser_{part}.jsonl" for part in range(11)]
    assert [path.name for path in official_files(tmp_path / "iter0", "test")] == ["loser_0_test.jsonl"]
    assert official_files(tmp_path, "train") == []


def test_rows_and_their_answers(tmp_path: Path, model: Path) -> None:
    from transformers import AutoTokenizer

    write_losers(tmp_path / "iter0")
    tables = prepared(tmp_path / "iter0", model, tmp_path / "data")
    tokenizer = AutoTokenizer.from_pretrained(model)
    train = tables["train"].to_pylist()
    assert [row["real_text"] for row in train] == [f"It is {n}" for n in range(22)]
    assert [tokenizer.decode(row["given_ids"]) for row in train[:2]] == ["one<|end|>", " two<|end|>"]
    assert train[-1]["given_ids"] == [tokenizer.eos_token_id], "an empty answer is its end"
    (heldout,) = tables["heldout"].to_pylist()
    assert tokenizer.decode(heldout["given_ids"]) == "held out<|end|>"


def test_parquet_folders_are_the_same(tmp_path: Path, model: Path) -> None:
    write_losers(tmp_path / "iter0")
    (tmp_path / "prefs").mkdir()
    for split in ("train", "test"):
        rows = [
            json.loads(line)
            for path in official_files(tmp_path / "iter0", split)
            for line in path.read_text().splitlines()
        ]
        table = pa.Table.from_pylist(rows, PAIRS)
        pq.write_table(table.slice(0, 9), tmp_path / "prefs" / f"{split}_prefs-00000-of-00002.parquet")
        pq.write_table(table.slice(9), tmp_path / "prefs" / f"{split}_prefs-00001-of-00002.parquet")
    one, other = (
        prepared(tmp_path / name, model, tmp_path / f"data-{name}", id_column=None)
        for name in ("iter0", "prefs")
    )
    assert one["train"].equals(other["train"]) and one["heldout"].equals(other["heldout"])


def test_an_answer_as_long_as_a_response_may_be(tmp_path: Path, model: Path) -> None:
    write_losers(tmp_path / "iter0")
    tables = prepared(tmp_path / "iter0", model, tmp_path / "data", max_response_length=2)
    assert max(len(ids) for ids in tables["train"]["given_ids"].to_pylist()) == 2


def test_what_they_need() -> None:
    accepted("data.use_generations=true", "data.format=spin")
    assert "data.use_generations" in refused("data.use_generations=true")
    more = "generation.num_generations=2"
    assert "data.use_generations" in refused("data.use_generations=true", "data.format=spin", more)
