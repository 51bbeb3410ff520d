from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_spin.config.schema import DataConfig
from nemo_spin.data import sources
from nemo_spin.data.sources import Piece, Source, is_hub_id, open_source, pack
from nemo_spin.errors import DataError
from tests.unit.data.tokenizers import write_jsonl, write_parquet

ROWS = [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(1100)]


def opened(path: Path | str, split: str = "train", **settings: Any) -> Source:
    return open_source(str(path), key="data.train", split=split, config=DataConfig(**settings))


def read(source: Source, columns: tuple[str, ...] = ("prompt", "response")) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for piece, total in source.pieces(list(columns)):
        assert total >= len(rows) + len(piece)
        assert list(piece.numbers) == list(range(len(rows), len(rows) + len(piece)))
        if piece.records is not None:
            rows += [json.loads(record) for record in piece.records]
        else:
            rows += pa.ipc.open_stream(piece.batch).read_all().to_pylist()
    return rows


def write_gzip(path: Path) -> Path:
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    return path


def write_array(path: Path) -> Path:
    path.write_text(json.dumps(ROWS, indent=1))
    return path


WRITERS = {
    "rows.parquet": lambda path: write_parquet(path, ROWS, row_group_size=300),
    "rows.jsonl": lambda path: write_jsonl(path, ROWS),
    "rows.json": write_array,
    "lines.json": lambda path: write_jsonl(path, ROWS),
    "rows.jsonl.gz": write_gzip,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_its_rows_in_order(tmp_path: Path, name: str) -> None:
    source = opened(WRITERS[name](tmp_path / name))
    assert source.columns() == ["prompt", "response"]
    assert read(source) == ROWS


def test_a_directory_is_read_through_datasets(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", ROWS[:600])
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", ROWS[600:])
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", ROWS[:3])
    assert opened(tmp_path).columns() == ["prompt", "response"]
    assert read(opened(tmp_path)) == ROWS
    assert read(opened(tmp_path, split="test")) == ROWS[:3]
    with pytest.raises(DataError, match="'validation'"):
        opened(tmp_path, split="validation").columns()


def test_only_the_wanted_columns_are_read(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{**row, "more": "x" * 100} for row in ROWS])
    assert read(opened(path)) == ROWS


def test_pieces_of_long_rows_are_bounded_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE_BYTES", 1000)
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x" * 400}] * 10)
    assert [len(piece) for piece, _ in opened(path).pieces([])] == [2] * 5


def test_the_first_rows_of_a_piece() -> None:
    records = Piece([0, 2, 5], records=[b"a", b"b", b"c"])
    assert records.first(2) == Piece([0, 2], records=[b"a", b"b"])
    assert records.first(9) is records
    assert len(pack(pa.table({"a": [1, 2, 3]}), 7).first(2)) == 2


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("HuggingFaceH4/ultrachat_200k", True),
        ("squad", True),
        ("data/train.jsonl", False),
        ("train.parquet", False),
        ("/data/train", False),
        ("./train", False),
        ("a/b/c", False),
        ("../up", False),
        ("", False),
    ],
)
def test_hub_ids_are_told_from_paths(spec: str, expected: bool) -> None:
    assert is_hub_id(spec) is expected


@pytest.mark.parametrize("name", ["gone.jsonl", "/no/such/file", "./gone"])
def test_a_missing_file_is_named(name: str) -> None:
    with pytest.raises(DataError, match="there is no such file") as caught:
        opened(name)
    assert f"data.train={name}" in str(caught.value)


def test_a_hub_id_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"org/name.*no such file, and.*ConnectionError: no network\)"):
        opened("org/name").columns()


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,response\n")
    with pytest.raises(DataError, match=r"ends in \.csv"):
        opened(tmp_path / "a.csv")


def test_what_is_no_parquet_or_a_cut_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"a\.parquet.*cannot be read"):
        opened(path).columns()
    whole = write_parquet(tmp_path / "b.parquet", ROWS).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.parquet.*cannot be read"):
        opened(path).columns()


def test_a_damaged_page_is_an_error_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, compression="gzip")
    data = bytearray(path.read_bytes())
    data[60:400] = b"\x00" * 340
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"a\.parquet.*cannot be read"):
        read(opened(path))


def test_a_cut_archive_is_an_error_of_the_file(tmp_path: Path) -> None:
    path = write_gzip(tmp_path / "a.jsonl.gz")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz.*cannot be read"):
        read(opened(path))


def test_an_empty_file_has_no_columns(tmp_path: Path) -> None:
    for name, text in (("a.jsonl", ""), ("b.jsonl", "\n\n"), ("c.json", "[]")):
        (tmp_path / name).write_text(text)
        assert opened(tmp_path / name).columns() == []
    (tmp_path / "d.jsonl").write_text("{broken\n")
    assert opened(tmp_path / "d.jsonl").columns() != []
