"""Headers against the reference implementation, and against files that are none."""

import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from nemo_spin.bridge.safetensors_format import layout, read_header
from nemo_spin.errors import CheckpointError

_DIRECTORY = tempfile.TemporaryDirectory()
SHAPES: dict[str, tuple[int, ...]] = {"b": (3, 5), "a": (7,), "empty": (0, 4), "scalar": ()}


def _written(path: Path, dtype: str = "BF16") -> Path:
    header, places = layout(SHAPES, dtype, path)
    size = max(place.offset + place.size for place in places.values())
    path.write_bytes(header + bytes(range(256))[: size - len(header)])
    return path


def _with_header(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_the_reference_implementation_reads_what_is_laid_out(tmp_path: Path) -> None:
    path = _written(tmp_path / "x.safetensors")
    with safe_open(path, "pt") as stored:
        assert stored.metadata() == {"format": "pt"}
        assert {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()} == SHAPES  # noqa: SIM118
        # b is the first tensor: its bytes are 0, 1, 2, ...
        bits = stored.get_tensor("b").view(torch.int16).numpy()
    assert bits.tobytes() == bytes(range(30))


def test_what_the_reference_implementation_writes_is_read(tmp_path: Path) -> None:
    tensors = {
        "x": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "y": torch.ones(4, dtype=torch.bfloat16),
        "z": torch.zeros(2, dtype=torch.float16),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert {name: (entry.dtype, entry.shape) for name, entry in header.items()} == {
        "x": ("F32", (2, 3)),
        "y": ("BF16", (4,)),
        "z": ("F16", (2,)),
    }
    place = header["x"]
    data = place.file.read_bytes()[place.offset : place.offset + place.size]
    np.testing.assert_array_equal(np.frombuffer(data, np.float32), np.arange(6))


def test_data_is_aligned_and_without_holes(tmp_path: Path) -> None:
    header, places = layout(SHAPES, "F32", tmp_path)
    assert len(header) % 8 == 0
    position = len(header)
    for name, shape in SHAPES.items():
        assert (places[name].offset, places[name].size) == (position, 4 * math.prod(shape))
        position += places[name].size


def test_a_layout_does_not_depend_on_where_the_file_is() -> None:
    assert layout(SHAPES, "F32", Path("a"))[0] == layout(SHAPES, "F32", Path("b/c"))[0]


@pytest.mark.parametrize("kept", [0, 7, 8, 60, -1])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    path = _written(tmp_path / "x.safetensors")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"x\.safetensors.*truncated"):
        read_header(path)


def test_bytes_after_the_data_are_refused(tmp_path: Path) -> None:
    path = _written(tmp_path / "x.safetensors")
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="overwritten"):
        read_header(path)


def _tensor(start: int, stop: int, **changes: object) -> dict[str, object]:
    return {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop], **changes}


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (b"[]", "not an object"),
        (b"{", "not valid"),
        (b'{"a": {}, "a": {}}', "a is there twice"),
        (b"\xff\xfe", "not valid"),
        ({"a": 3}, "tensor a"),
        ({"a": {"dtype": "U8"}}, "tensor a"),
        ({"a": _tensor(0, 4, dtype="F8_E4M3")}, "F8_E4M3"),
        ({"a": _tensor(0, 4, dtype=["U8"])}, "tensor a"),
        ({"a": _tensor(0, 4, shape=[5])}, "tensor a has 4 bytes"),
        ({"a": _tensor(0, 4, shape=[-4])}, "tensor a"),
        ({"a": _tensor(0, 4, shape=[True, 4])}, "tensor a"),
        ({"a": _tensor(0, 4, data_offsets=[0, 4, 8])}, "tensor a"),
        ({"a": _tensor(1, 4)}, "tensor a begins"),
        ({"a": _tensor(0, 3), "b": _tensor(2, 4)}, "tensor b begins"),
        ({"a": _tensor(0, 2), "b": _tensor(3, 4)}, "tensor b begins"),
        ({"a": _tensor(0, 3)}, "4 bytes|describes"),
        ({"a": _tensor(0, 4), "b": _tensor(0, 4)}, "tensor b begins"),
        ({"a": _tensor(0, 2**63)}, "describes"),
        ({"a": _tensor(0, 4), "b": _tensor(2**63, 2**63 + 4)}, "tensor b begins"),
        ({"a": _tensor(0, 4, shape=[2**40, 2**40])}, "tensor a has 4 bytes"),
        ({"a": _tensor(4, 0, shape=[0])}, "tensor a has -4 bytes"),
        ({"a": _tensor(0, 4, data_offsets=[0, 1e999])}, "tensor a"),
        ({"a": _tensor(-8, -4, shape=[4])}, "tensor a"),
    ],
    ids=str,
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, header: object, found: str) -> None:
    with pytest.raises(CheckpointError, match=found):
        read_header(_with_header(tmp_path / "x.safetensors", header, b"1234"))


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 100_000_001, 5])
def test_a_header_longer_than_the_file_is_not_read(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="truncated"):
        read_header(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="no regular file"):
        read_header(tmp_path / "x.safetensors")


def _errors_name_the_file(path: Path) -> None:
    try:
        read_header(path)
    except CheckpointError as error:
        message = str(error)
    else:
        message = path.name
    assert path.name in message


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_garbage_is_an_error_of_the_file_and_nothing_else(garbage: bytes, framed: bool) -> None:
    path = Path(_DIRECTORY.name) / "x.safetensors"
    path.write_bytes((len(garbage).to_bytes(8, "little") if framed else b"") + garbage)
    _errors_name_the_file(path)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_flipped_byte_in_a_header_never_crashes(data: st.DataObject) -> None:
    path = _written(Path(_DIRECTORY.name) / "y.safetensors")
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    _errors_name_the_file(path)


def test_a_header_that_is_too_deep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not valid"):
        read_header(_with_header(tmp_path / "x.safetensors", b"[" * 100_000))
