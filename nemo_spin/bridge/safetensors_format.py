"""The safetensors format, as far as files are read and written here: its header.

Eight bytes give the length of a JSON header, the header gives dtype, shape and place of
every tensor, and the data follows without holes. Nothing in such a file is executed.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_spin.errors import CheckpointError, explain

ITEM_SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
WEIGHT_DTYPES = ("F32", "BF16", "F16")
DTYPE_OF = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # config.json's names
_LONGEST_HEADER = 100_000_000  # bytes; the reference implementation's limit
_ALIGNMENT = 8


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        dtype: As the header spells it, such as BF16.
        offset: First byte, from the start of the file.
        size: Bytes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def damaged(
    path: Path, found: str, remedy: str = "download or export the checkpoint again"
) -> CheckpointError:
    """The error for a file that does not hold what it must."""
    rule = "weights are complete safetensors files that agree with config.json"
    return CheckpointError(explain(str(path), found=found, rule=rule, remedy=remedy))


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file; only its header is read.

    Raises:
        CheckpointError: The file is missing, truncated, or its header contradicts itself.
    """
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise damaged(path, "is no regular file")
        file_size = path.stat().st_size
        with path.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(_LONGEST_HEADER, file_size - 8):
                raise damaged(
                    path, f"has {file_size} bytes, too few for its header: truncated or no safetensors"
                )
            header = json.loads(stream.read(length), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"its header is not valid ({error})") from error
    if not isinstance(header, dict):
        raise damaged(path, "its header is not an object")
    header.pop("__metadata__", None)
    data_start = 8 + length
    tensors = {name: _entry(path, name, entry, data_start) for name, entry in header.items()}
    end = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size)):
        if tensor.offset != end:
            raise damaged(path, f"tensor {name} begins at byte {tensor.offset}, where {end} is next")
        end = tensor.offset + tensor.size
    if end != file_size:
        raise damaged(path, f"has {file_size} bytes; its header describes {end}: truncated or overwritten")
    return tensors


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name} is there twice")
        values[name] = value
    return values


def _entry(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        counts = (*shape, start, stop)
        valid = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in counts)
    except (TypeError, KeyError, ValueError):
        raise damaged(path, f"its header has no valid entry for tensor {name}") from None
    if not valid or not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise damaged(path, f"tensor {name} has dtype {dtype} and shape {list(shape)}: not supported")
    if stop - start != math.prod(shape) * ITEM_SIZES[dtype]:
        raise damaged(path, f"tensor {name} has {stop - start} bytes for shape {list(shape)} in {dtype}")
    return StoredTensor(path, dtype, shape, data_start + start, stop - start)


def layout(
    tensors: dict[str, tuple[int, ...]], dtype: str, path: Path
) -> tuple[bytes, dict[str, StoredTensor]]:
    """The first bytes of a file with these tensors, and where each will lie.

    The bytes depend on the arguments alone (not on `path`).

    Args:
        tensors: Name -> shape, in the order of the data.
        dtype: Type of them all, as the header spells it.
        path: The file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in tensors.items():
        size = math.prod(shape) * ITEM_SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    start = 8 + len(text)
    places = {
        name: StoredTensor(path, dtype, shape, start + header[name]["data_offsets"][0], _size(header[name]))
        for name, shape in tensors.items()
    }
    return len(text).to_bytes(8, "little") + text, places


def _size(entry: dict[str, Any]) -> int:
    start, stop = entry["data_offsets"]
    return int(stop - start)
