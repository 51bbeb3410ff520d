from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_spin.data import json_records
from nemo_spin.data.json_records import is_array, read_array, read_lines
from nemo_spin.errors import DataError


def array(data: bytes) -> list[Any]:
    stream = io.BytesIO(data)
    return [json.loads(record.text) for record in read_array(stream, stream.tell)]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    rows=st.lists(JSON),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_arrays_are_read_whole_wherever_chunks_end(
    rows: list[Any], indent: int | None, ascii_only: bool, chunk: int
) -> None:
    data = json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    whole = json_records._CHUNK_BYTES
    json_records._CHUNK_BYTES = chunk
    try:
        assert array(b"\n " + data + b"\n") == rows
    finally:
        json_records._CHUNK_BYTES = whole


def test_numbers_that_a_chunk_cuts_are_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_records, "_CHUNK_BYTES", 1)
    assert array(b"[12,345]") == [12, 345]


def test_bytes_that_are_no_utf8_stay_in_their_element() -> None:
    stream = io.BytesIO(b'[{"a": "\xff"}, {"a": "b"}]')
    assert [record.text for record in read_array(stream, stream.tell)] == [b'{"a": "\xff"}', b'{"a": "b"}']


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b'[{"a": 1}, {"a"', "element 1"),
        (b'[{"a": 1} {"a": 2}]', "element 1"),
        (b'[{"a": 1},]', "element 1"),
        (b'[{"a": 1}', "element 1"),
        (b"[1] 2", "behind the array's end"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_broken_arrays_say_where(data: bytes, place: str) -> None:
    with pytest.raises(DataError, match=place):
        array(data)


def test_endless_elements_and_lines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_records, "MAX_RECORD_BYTES", 100)
    monkeypatch.setattr(json_records, "_CHUNK_BYTES", 10)
    with pytest.raises(DataError, match="element 0"):
        array(b'["' + b"a" * 1000)
    with pytest.raises(DataError, match="line 2"):
        list(read_lines(io.BytesIO(b"1\n" + b"a" * 1000), lambda: 0))


def test_lines_keep_their_numbers_over_blank_ones() -> None:
    stream = io.BytesIO(b"\xef\xbb\xbf{}\r\n\n  \n[1]")
    assert [(record.number, record.text) for record in read_lines(stream, stream.tell)] == [
        (0, b"{}"),
        (3, b"[1]"),
    ]


@pytest.mark.parametrize(
    ("data", "expected"), [(b" \n [", True), (b"\xef\xbb\xbf[", True), (b'{"a": [1]}', False), (b"", False)]
)
def test_arrays_are_told_from_lines(data: bytes, expected: bool) -> None:
    assert is_array(io.BufferedReader(io.BytesIO(data))) is expected
