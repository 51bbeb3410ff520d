"""What an export consists of, beside the values: known before any rank writes, without torch.

Every rank derives the same plan from the architecture alone, so that all know the byte
at which each tensor begins and none has to ask. The bytes of an export depend neither on
how the model was split nor on the time.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_spin.bridge.checkpoint_files import INDEX_NAME, SINGLE_NAME
from nemo_spin.bridge.mappings import Shape
from nemo_spin.bridge.safetensors_format import DTYPE_OF, ITEM_SIZES, StoredTensor, layout
from nemo_spin.data.files import read_manifest
from nemo_spin.errors import NemoSpinError
from nemo_spin.megatron.architecture import Architecture

CARD_NAME = "README.md"
MAX_SHARD_BYTES = 10**9  # several files are hashed, and read by vLLM, at the same time


@dataclass(frozen=True)
class WeightFile:
    """One safetensors file: its first bytes and its size."""

    header: bytes
    size: int


@dataclass(frozen=True)
class ExportPlan:
    """The weight files of an export.

    Attributes:
        dtype: Of all tensors, as safetensors spells it.
        files: By name, in order.
        places: Where each tensor goes; `file` is a bare name.
        index: Content of the index; None for a single file.
    """

    dtype: str
    files: dict[str, WeightFile]
    places: dict[str, StoredTensor]
    index: dict[str, Any] | None


def plan_export(shapes: Mapping[str, Shape], *, dtype: str, max_shard_bytes: int) -> ExportPlan:
    """Distributes tensors over files of at most `max_shard_bytes` (or one tensor), in their order."""
    shards: list[dict[str, Shape]] = [{}]
    used = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * ITEM_SIZES[dtype]
        if shards[-1] and used + size > max_shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = shape
        used += size
    files: dict[str, WeightFile] = {}
    places: dict[str, StoredTensor] = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE_NAME if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, entries = layout(shard, dtype, Path(name))
        data_size = sum(entry.size for entry in entries.values())
        files[name] = WeightFile(header, len(header) + data_size)
        places |= entries
    index = None
    if len(shards) > 1:
        total = sum(entry.size for entry in places.values())
        weight_map = {name: str(entry.file) for name, entry in places.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return ExportPlan(dtype, files, places, index)


def create_files(plan: ExportPlan, directory: Path) -> None:
    """Creates the weight files with their headers and reserves the room for all data.

    Raises:
        OSError: There is not enough room: known here, before anything is written.
    """
    all_reserved = True
    for name, file in plan.files.items():
        descriptor = os.open(directory / name, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o644)
        try:
            all_reserved &= _reserve(descriptor, file.size)
            os.pwrite(descriptor, file.header, 0)
        finally:
            os.close(descriptor)
    if not all_reserved:
        _look_for_room(directory, sum(file.size for file in plan.files.values()))
    if plan.index is not None:
        text = json.dumps(plan.index, indent=2, sort_keys=True) + "\n"
        (directory / INDEX_NAME).write_text(text, encoding="utf-8")


def _find_fallocate() -> Callable[[int, int, int, int], int] | None:
    """The system call of Linux itself; None where the C library has none."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        function.restype = ctypes.c_int
    return function


_fallocate = _find_fallocate()


def _reserve(descriptor: int, size: int) -> bool:
    """Gives a new file its size and room on the disk; False where the file system reserves none.

    There, `posix_fallocate` would write into every block: one machine all weights' worth of zeros,
    before the others begin.
    """
    while _fallocate is not None:
        if _fallocate(descriptor, 0, 0, size) == 0:
            return True
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS):
            break
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    os.ftruncate(descriptor, size)
    return False


def _look_for_room(directory: Path, size: int) -> None:
    """Refuses what the file system says it has no room for; some do not say."""
    status = os.statvfs(directory)
    if status.f_blocks and status.f_bavail * status.f_frsize < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def base_model(source_dir: Path) -> str:
    """What to call the model that all this began with: as an earlier export says, else by the source.

    A snapshot in the hub's cache has the hub's name, any other directory its own; where it
    lies on this machine is nobody's business.
    """
    with contextlib.suppress(NemoSpinError):
        manifest = read_manifest(source_dir)
        if manifest is not None and isinstance(manifest.counts.get("base_model"), str):
            return str(manifest.counts["base_model"])
    real = source_dir.resolve()
    if real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--"):
        return real.parent.parent.name.removeprefix("models--").replace("--", "/")
    return real.name


def model_card(
    architecture: Architecture, *, dtype: str, num_parameters: int, extra: Mapping[str, Any]
) -> str:
    """A short model card.

    Args:
        extra: Facts, listed as they are, mappings in a section of their own; `base_model` stands in
            the header too, and an `iteration` tells that the model comes from self-play.
    """
    spelt = next(name for name, stored in DTYPE_OF.items() if stored == dtype)
    is_self_play = extra.get("iteration") is not None
    tags = "[spin, self-play]" if is_self_play else "[nemo_spin]"
    lines = ["---"]
    if "base_model" in extra:
        lines.append(f"base_model: {json.dumps(str(extra['base_model']))}")
    lines += ["library_name: transformers", "pipeline_tag: text-generation", f"tags: {tags}", "---", ""]
    lines += ["# A model written by nemo_spin", ""]
    if is_self_play:
        lines += [
            "Fine-tuned by self-play (SPIN, [arXiv 2401.01335](https://arxiv.org/abs/2401.01335)): the model",
            "learned to tell its own earlier answers from those of the demonstrations.",
            "",
        ]
    facts = {
        "architecture": architecture.hf_architecture,
        "parameters": f"{num_parameters:,}",
        "weights": spelt,
        **{key: value for key, value in extra.items() if not isinstance(value, Mapping)},
    }
    lines += _table(facts)
    for title, section in extra.items():
        if isinstance(section, Mapping) and section:
            lines += ["", f"## {title.capitalize()}", "", *_table(section)]
    return "\n".join(lines) + "\n"


def _table(facts: Mapping[str, Any]) -> list[str]:
    rows = (f"| {_cell(key)} | {_cell(value)} |" for key, value in facts.items() if value is not None)
    return ["| | |", "|---|---|", *rows]


def _cell(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return text.replace("|", "\\|").replace("\n", " ")


def files_in(directory: Path) -> list[str]:
    """All files of a finished export, relative to it, in a fixed order."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
