from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from nemo_spin.config.schema import DataConfig
from nemo_spin.data import prepare as prepare_module
from nemo_spin.data.columns import PREPARED, QUARANTINED
from nemo_spin.data.files import read_manifest, verify_manifest
from nemo_spin.data.inputs import prepare_inputs
from nemo_spin.data.overlong import RowLimit
from nemo_spin.data.prepare import prepare
from nemo_spin.data.worth_knowing import overlap_note
from nemo_spin.errors import ConfigError, DataError
from tests.unit.data.tokenizers import conversation, conversations, save_tokenizer, write_jsonl, write_parquet

PAPER = "### Instruction: {prompt}\n\n### Response: "


class Heard:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.updates: list[tuple[int, int, str, dict[str, Any]]] = []
        self.notes: list[str] = []

    def update(self, done: int, total: int, unit: str, **values: Any) -> None:
        self.updates.append((done, total, unit, values))

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def test_files_manifest_and_counts(tmp_path: Path, tokenizer_dir: Path) -> None:
    rows = [*conversations(30), conversation("", "x"), conversation("x", ""), "{"]
    # Two prompts are in both: one with another answer, and one demonstration as it is.
    heldout = [conversation("Add 3 and 4.", "another answer"), *conversations(33)[29:]]
    config = DataConfig(
        train=str(write_jsonl(tmp_path / "a.jsonl", rows)),
        heldout=str(write_parquet(tmp_path / "b.parquet", heldout)),
        max_quarantined_share=0.1,
    )
    heard = Heard()
    manifest = prepare(config, tokenizer_dir=tokenizer_dir, out_dir=tmp_path / "data", progress=heard)
    assert read_manifest(tmp_path / "data") == manifest
    verify_manifest(tmp_path / "data", manifest)
    assert sorted(manifest.files) == ["heldout.parquet", "quarantine.parquet", "train.parquet"]
    assert manifest.inputs == prepare_inputs(config, tokenizer_dir)
    train = rows_of(tmp_path / "data" / "train.parquet")
    assert pq.read_schema(tmp_path / "data" / "train.parquet").equals(PREPARED)
    counts = manifest.counts["train"]
    assert counts["rows"] == len(train) == 30
    assert counts["prompt_tokens"] == sum(len(row["prompt_ids"]) for row in train)
    assert counts["real_tokens"] == sum(len(row["real_ids"]) for row in train)
    assert counts["real_length"]["max"] == max(len(row["real_ids"]) for row in train)
    assert counts["quarantined_by_reason"] == {"empty prompt": 1, "no response": 1, "not JSON": 1}
    assert (manifest.counts["heldout"]["rows"], manifest.counts["heldout"]["also_in_train"]) == (5, 2)
    assert "also_in_train" not in counts
    assert manifest.counts["stop_token_ids"] == [1, 3]
    quarantine = pq.read_table(tmp_path / "data" / "quarantine.parquet")
    assert quarantine.schema.equals(QUARANTINED)
    assert [(row["row"], row["split"]) for row in quarantine.to_pylist()] == [
        (n, "train") for n in (30, 31, 32)
    ]
    assert heard.notes == [
        "train: 3 of 33 rows refused (1 empty prompt, 1 no response, 1 not JSON); see quarantine.parquet",
        overlap_note(manifest.counts),
    ]
    assert heard.updates[-1] == (5, 5, "rows", {"split": "heldout", "quarantined": 0})
    assert any(done == total == 33 for done, total, _, _ in heard.updates)
    assert sorted(entry.name for entry in (tmp_path / "data").iterdir()) == sorted(
        [*manifest.files, "manifest.json"]
    )


def test_overlong_units_are_counted_and_kept(tmp_path: Path, tokenizer_dir: Path) -> None:
    config = DataConfig(train=str(write_jsonl(tmp_path / "a.jsonl", conversations(30))))
    plain = prepare(config, tokenizer_dir=tokenizer_dir, out_dir=tmp_path / "plain")
    assert "overlong" not in plain.counts["train"]
    lengths = [
        len(row["prompt_ids"]) + len(row["real_ids"]) for row in rows_of(tmp_path / "plain" / "train.parquet")
    ]
    limit = RowLimit("shared_prompt", max(lengths) + 4, num_generations=1, max_tokens=5)
    heard = Heard()
    manifest = prepare(
        config, tokenizer_dir=tokenizer_dir, out_dir=tmp_path / "data", row_limit=limit, progress=heard
    )
    longest = lengths.count(max(lengths))
    assert manifest.counts["train"]["overlong"] == {
        "micro_batch_tokens": max(lengths) + 4,
        "possible": longest,
        "certain": 0,
        "longest": max(lengths) + 5,
    }
    assert len(heard.notes) == 1 and heard.notes[0].startswith(f"train: {longest} of 30 rows may become")
    assert manifest.sha256() == plain.sha256()


def test_the_same_bytes_whatever_the_number_of_processes(tmp_path: Path, tokenizer_dir: Path) -> None:
    rows = [*conversations(4500), "{", *conversations(700)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    manifests = [
        prepare(
            DataConfig(train=str(path), num_workers=num_workers),
            tokenizer_dir=tokenizer_dir,
            out_dir=tmp_path / str(num_workers),
        )
        for num_workers in (1, 3)
    ]
    assert manifests[0] == manifests[1]
    file = pq.ParquetFile(tmp_path / "3" / "train.parquet")
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert groups == [2048, 2048, 1104]
    ids = file.read(columns=["id"])["id"].to_pylist()
    assert len(set(ids)) == 5200  # 700 conversations are there twice
    assert sum(name.endswith("-1") for name in ids) == 700
    assert [name.removesuffix("-1") for name in ids[4500:]] == ids[:700]


def test_formats_and_files_of_the_same_text_give_the_same_rows(tmp_path: Path, tokenizer_dir: Path) -> None:
    rows = conversations(20)
    pairs = [
        {"prompt": row["messages"][0]["content"], "response": row["messages"][1]["content"]} for row in rows
    ]
    spin = [{"real": row["messages"], "generated": row["messages"]} for row in rows]
    (tmp_path / "folder").mkdir()
    write_parquet(tmp_path / "folder" / "train-00000-of-00001.parquet", rows)
    (tmp_path / "array.json").write_text(json.dumps(rows))
    inputs: dict[str, tuple[Path, str]] = {
        "lines": (write_jsonl(tmp_path / "a.jsonl", rows), "messages"),
        "array": (tmp_path / "array.json", "messages"),
        "parquet": (write_parquet(tmp_path / "a.parquet", rows), "messages"),
        "folder": (tmp_path / "folder", "messages"),
        "pairs": (write_parquet(tmp_path / "pairs.parquet", pairs), "prompt_response"),
        "spin": (write_parquet(tmp_path / "spin.parquet", spin), "spin"),
    }
    results = {}
    for name, (path, kind) in inputs.items():
        config = DataConfig(train=str(path), format=kind)
        results[name] = prepare(config, tokenizer_dir=tokenizer_dir, out_dir=tmp_path / name).sha256()
    assert len(set(results.values())) == 1, results


def test_the_papers_template(tmp_path: Path) -> None:
    directory = save_tokenizer(tmp_path / "tokenizer", template=None)
    config = DataConfig(train=str(write_jsonl(tmp_path / "a.jsonl", conversations(3))), prompt_template=PAPER)
    prepare(config, tokenizer_dir=directory, out_dir=tmp_path / "data")
    row = rows_of(tmp_path / "data" / "train.parquet")[0]
    assert row["prompt_text"] == "### Instruction: Add 0 and 1.\n\n### Response: "
    assert row["real_text"] == "The sum is 1."
    assert row["real_ids"][-1] == 1


def test_only_the_first_rows(tmp_path: Path, tokenizer_dir: Path) -> None:
    for name, path in {
        "lines": write_jsonl(tmp_path / "a.jsonl", [*conversations(600), "{"]),
        "parquet": write_parquet(tmp_path / "a.parquet", conversations(600)),
    }.items():
        config = DataConfig(train=str(path), max_rows=520)
        manifest = prepare(config, tokenizer_dir=tokenizer_dir, out_dir=tmp_path / name)
        assert manifest.counts["train"]["rows"] == 520
        assert len(rows_of(tmp_path / name / "train.parquet")) == 520


def test_ids_from_a_column_are_kept_and_made_unique(tmp_path: Path, tokenizer_dir: Path) -> None:
    rows = [{**row, "key": key} for row, key in zip(conversations(5), ["a", "a", "a-1", 7, "a"], strict=True)]
    config = DataConfig(train=str(write_jsonl(tmp_path / "a.jsonl", rows)), id_column="key")
    prepare(config, tokenizer_dir=tokenizer_dir, out_dir=tmp_path / "data")
    names = [row["id"] for row in rows_of(tmp_path / "data" / "train.parquet")]
    assert names == ["a", "a-1", "a-1-1", "7", "a-2"]


def test_too_many_refusals_stop_with_the_reasons_and_leave_the_quarantine(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    rows = [*conversations(90), *["{"] * 6, *[conversation("", "x")] * 4]
    config = DataConfig(train=str(write_jsonl(tmp_path / "a.jsonl", rows)), max_quarantined_share=0.09)
    with pytest.raises(DataError) as caught:
        prepare(config, tokenizer_dir=tokenizer_dir, out_dir=tmp_path / "data")
    message = str(caught.value)
    assert "10 of 100 rows (10.0%) were refused; most often: 6 not JSON, 4 empty prompt" in message
    assert "data.max_quarantined_share=0.09" in message
    assert str(tmp_path / "data" / "quarantine.parquet") in message
    assert len(rows_of(tmp_path / "data" / "quarantine.parquet")) == 10
    assert [entry.name for entry in (tmp_path / "data").iterdir()] == ["quarantine.parquet"]
    config.max_quarantined_share = 0.1
    assert (
        prepare(config, tokenizer_dir=tokenizer_dir, out_dir=tmp_path / "data").counts["train"]["rows"] == 90
    )


def test_all_rows_refused_is_an_error_whatever_the_share(tmp_path: Path, tokenizer_dir: Path) -> None:
    config = DataConfig(
        train=str(write_jsonl(tmp_path / "a.jsonl", [conversation("", "x")])), max_quarantined_share=1.0
    )
    with pytest.raises(DataError, match="1 of 1 rows"):
        prepare(config, tokenizer_dir=tokenizer_dir, out_dir=tmp_path / "data")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train": "{tmp}/gone.jsonl"}, "there is no such file"),
        ({"train": "{tmp}/empty.jsonl"}, "has no rows"),
        ({"train": "{tmp}/empty.parquet"}, "has no rows"),
        (
            {"train": "{tmp}/a.jsonl", "messages_column": "chat"},
            "has no column chat; its columns are messages",
        ),
        ({"train": "{tmp}/a.jsonl", "id_column": "key"}, "has no column key"),
        ({"train": "{tmp}/a.jsonl", "format": "prompt_response"}, "has no column prompt, response"),
        ({"train": "{tmp}/a.jsonl", "heldout": "{tmp}/gone.parquet"}, "data.heldout"),
        ({"train": "{tmp}/broken.json"}, "element 299"),
    ],
)
def test_bad_data_is_named_and_nothing_earlier_is_lost(
    tmp_path: Path, tokenizer_dir: Path, settings: dict[str, str], said: str
) -> None:
    write_jsonl(tmp_path / "a.jsonl", conversations(2))
    (tmp_path / "empty.jsonl").write_text("\n")
    write_parquet(tmp_path / "empty.parquet", conversations(2))
    table = pq.read_table(tmp_path / "empty.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "empty.parquet")
    (tmp_path / "broken.json").write_text(json.dumps(conversations(300))[:-20])
    good = prepare(
        DataConfig(train=str(tmp_path / "a.jsonl")), tokenizer_dir=tokenizer_dir, out_dir=tmp_path / "data"
    )
    filled = {key: value.replace("{tmp}", str(tmp_path)) for key, value in settings.items()}
    with pytest.raises(DataError) as caught:
        prepare(DataConfig(**filled), tokenizer_dir=tokenizer_dir, out_dir=tmp_path / "data")
    assert said in str(caught.value)
    assert "rule:" in str(caught.value)
    assert "remedy:" in str(caught.value)
    verify_manifest(tmp_path / "data", good)


@pytest.mark.parametrize(
    "settings", [{"format": "alpaca"}, {"overlong_prompt": "drop"}, {"overlong_response": "drop"}]
)
def test_unknown_settings_are_refused(tmp_path: Path, tokenizer_dir: Path, settings: dict[str, str]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", conversations(2))
    with pytest.raises(ConfigError, match=next(iter(settings.values()))):
        prepare(
            DataConfig(train=str(path), **settings), tokenizer_dir=tokenizer_dir, out_dir=tmp_path / "data"
        )


def test_no_template_at_all_is_refused(tmp_path: Path) -> None:
    directory = save_tokenizer(tmp_path / "tokenizer", template=None)
    path = write_jsonl(tmp_path / "a.jsonl", conversations(2))
    with pytest.raises(ConfigError, match=r"data\.prompt_template"):
        prepare(DataConfig(train=str(path)), tokenizer_dir=directory, out_dir=tmp_path / "data")


def test_a_full_disk_leaves_no_half_file(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, batch: Any) -> None:
        raise OSError(28, "No space left on device")

    path = write_jsonl(tmp_path / "a.jsonl", conversations(2))
    monkeypatch.setattr(prepare_module.RowWriter, "write", full)
    with pytest.raises(DataError, match="No space left on device"):
        prepare(DataConfig(train=str(path)), tokenizer_dir=tokenizer_dir, out_dir=tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_what_a_killed_call_left_is_cleared(tmp_path: Path, tokenizer_dir: Path) -> None:
    config = DataConfig(train=str(write_jsonl(tmp_path / "a.jsonl", conversations(5))))
    whole = prepare(config, tokenizer_dir=tokenizer_dir, out_dir=tmp_path / "whole")
    (tmp_path / "data").mkdir()
    for name in (".train.parquet.7.partial", "train.parquet", ".quarantine.parquet.7.partial"):
        (tmp_path / "data" / name).write_bytes(b"half")
    assert prepare(config, tokenizer_dir=tokenizer_dir, out_dir=tmp_path / "data") == whole
    assert not list((tmp_path / "data").glob(".*"))


def test_importing_this_room_is_cheap() -> None:
    code = (
        "import sys, nemo_spin.data.prepare, nemo_spin.data.pairs;"
        "assert not {'torch', 'transformers', 'datasets'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3], timeout=60)
