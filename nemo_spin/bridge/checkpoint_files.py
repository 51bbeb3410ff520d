"""A Hugging Face directory's weights: found, checked and hashed, without torch.

vLLM accepts a checkpoint that lacks a linear layer's weights, or holds NaN, and answers
with garbage. So nothing gets a directory that `check_checkpoint` has not passed.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nemo_spin.bridge.companions import TOKENIZER_FILES, refuse_strange_links
from nemo_spin.bridge.families import architecture_of, family_of
from nemo_spin.bridge.families.table import Family
from nemo_spin.bridge.hf_config import CONFIG_NAME, GENERATION_CONFIG_NAME, read_json
from nemo_spin.bridge.mappings import Region
from nemo_spin.bridge.safetensors_format import ITEM_SIZES, WEIGHT_DTYPES, StoredTensor, damaged, read_header
from nemo_spin.data.files import read_manifest, sha256_files, sha256_text
from nemo_spin.errors import CheckpointError, DataError, explain
from nemo_spin.megatron.architecture import Architecture

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_INTEGERS = {2: np.int16, 4: np.int32}
_CHECK_BYTES = 4 << 20  # read at once when values are checked
_AHEAD_BYTES = 32 << 20  # asked of the disk at once by who reads a file from front to back
_EXPONENTS: dict[str, tuple[type[np.uint16] | type[np.uint32], int]] = {
    "F32": (np.uint32, 0x7F800000),
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
}


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a directory, by name; its files are mapped into memory when first read."""

    directory: Path
    tensors: dict[str, StoredTensor]
    _maps: dict[Path, mmap.mmap] = field(default_factory=dict, compare=False, repr=False)
    _asked: dict[Path, int] = field(default_factory=dict, compare=False, repr=False)

    def _mapped(self, name: str) -> np.ndarray:
        """The bytes of a tensor as they lie in the file: [size], uint8, read-only."""
        tensor = self.tensors[name]
        if tensor.file not in self._maps:
            with tensor.file.open("rb") as stream:
                self._maps[tensor.file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(self._maps[tensor.file], np.uint8, tensor.size, tensor.offset)

    def read(self, name: str, region: Region) -> np.ndarray:
        """A copy of a region of a tensor, its bits as signed integers of its item size."""
        tensor = self.tensors[name]
        values = self._mapped(name).view(_INTEGERS[ITEM_SIZES[tensor.dtype]]).reshape(tensor.shape)
        copy = np.array(values[tuple(slice(*bounds) for bounds in region)])
        row_bytes = tensor.size // max(1, tensor.shape[0]) if tensor.shape else tensor.size
        first, last = region[0] if region else (0, 1)
        self._release(tensor, first * row_bytes, last * row_bytes)
        return copy

    def position(self, name: str, region: Region) -> tuple[str, int]:
        """Where a region begins: its file, and the byte in it."""
        tensor = self.tensors[name]
        row_bytes = tensor.size // max(1, tensor.shape[0]) if tensor.shape else 0
        return str(tensor.file), tensor.offset + (region[0][0] * row_bytes if region else 0)

    def ask_for(self, name: str, region: Region) -> None:
        """Lets the disk read on from a region, for who is to read the file from there to its end."""
        self._mapped(name)
        file, (_, start) = self.tensors[name].file, self.position(name, region)
        if start + _AHEAD_BYTES // 2 < self._asked.get(file, 0):
            return
        first, mapped = start // mmap.PAGESIZE * mmap.PAGESIZE, self._maps[file]
        self._asked[file] = first + _AHEAD_BYTES
        mapped.madvise(mmap.MADV_WILLNEED, first, min(_AHEAD_BYTES, len(mapped) - first))

    def _release(self, tensor: StoredTensor, start: int, stop: int) -> None:
        """Gives back the memory of a range that was read; a rank is not to hold the file."""
        first = (tensor.offset + start) // mmap.PAGESIZE * mmap.PAGESIZE
        self._maps[tensor.file].madvise(mmap.MADV_DONTNEED, first, tensor.offset + stop - first)


def open_checkpoint(hf_dir: Path) -> Checkpoint:
    """Finds the tensors of a directory by the headers of its files.

    Raises:
        CheckpointError: There are no safetensors, or a file is missing, truncated, leaves
            the directory, or the index contradicts it.
    """
    hf_dir = Path(hf_dir)
    index_path = hf_dir / INDEX_NAME
    stored = sorted(path.name for path in hf_dir.glob("*.safetensors"))
    if not index_path.exists():
        if not stored:
            raise _no_safetensors(hf_dir)
        if stored != [SINGLE_NAME]:
            found = f"has {', '.join(stored[:4])}{' …' if len(stored) > 4 else ''}"
            raise damaged(hf_dir, f"{found} without {INDEX_NAME}, which would say what is where")
        return Checkpoint(hf_dir, read_header(hf_dir / SINGLE_NAME))
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(index_path, "has no weight_map")
    files = {_file_in(hf_dir, index_path, name) for name in weight_map.values()}
    if SINGLE_NAME in stored and hf_dir / SINGLE_NAME not in files:
        raise damaged(
            index_path,
            f"does not mention {SINGLE_NAME}, which is there: which is meant?",
            "remove one of them",
        )
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(files):
        for name, tensor in read_header(file).items():
            if weight_map.get(name) != file.name:
                raise damaged(
                    index_path, f"says {weight_map.get(name)} for tensor {name}, which is in {file.name}"
                )
            tensors[name] = tensor
    for name, file_name in weight_map.items():
        if name not in tensors:
            raise damaged(hf_dir / file_name, f"does not hold tensor {name}, as {INDEX_NAME} says")
    return Checkpoint(hf_dir, tensors)


def _file_in(hf_dir: Path, index_path: Path, name: object) -> Path:
    """The file that an index names: in the directory itself, nowhere else."""
    plain = isinstance(name, str) and name == os.path.basename(name) and "\\" not in name and "\0" not in name
    if not plain or not str(name).endswith(".safetensors"):
        raise damaged(
            index_path,
            f"names the file {name!r}",
            "an index names safetensors files beside it, nothing else: get the checkpoint where you trust it",
        )
    return hf_dir / str(name)


_PICKLES = ("*.bin", "*.pt", "*.pth", "*.bin.index.json")
_CONVERT = (
    "convert it where you trust it, and copy the tokenizer's files beside the result: "
    'python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('{source}', dtype='auto').save_pretrained('{source}-safetensors')\""
)


def _no_safetensors(hf_dir: Path) -> CheckpointError:
    pickled = sorted(path.name for pattern in _PICKLES for path in hf_dir.glob(pattern))
    remedy = _CONVERT.format(source=hf_dir)
    if not pickled:
        where = f"download or export the checkpoint again; if there are .bin files only, {remedy}"
        return damaged(hf_dir, f"has no {SINGLE_NAME} and no {INDEX_NAME}", where)
    return CheckpointError(
        explain(
            str(hf_dir),
            found=f"has weights only as {pickled[0]}",
            rule="weights are safetensors; a .bin file is a pickle, which can run code, and is never opened",
            remedy=remedy,
        )
    )


def open_model(hf_dir: Path, architecture: Architecture) -> Checkpoint:
    """Opens the checkpoint of a model and checks it against its family's table, by headers alone.

    Its tensors have the names that the table gives them, whatever some checkpoints call them.

    Raises:
        CheckpointError: See `open_checkpoint` and `check_tensors`.
    """
    family = family_of(architecture)
    checkpoint = open_checkpoint(hf_dir)
    prefix = family.optional_prefix
    if prefix and not any(name.startswith(prefix) for name in checkpoint.tensors):
        named = {
            name if name == family.output_layer.hf else prefix + name: tensor
            for name, tensor in checkpoint.tensors.items()
        }
        checkpoint = Checkpoint(checkpoint.directory, named)
    check_tensors(checkpoint, architecture, family)
    return checkpoint


def check_tensors(checkpoint: Checkpoint, architecture: Architecture, family: Family) -> None:
    """Names, shapes and dtypes against the family's table; reads nothing but headers.

    Raises:
        CheckpointError: A tensor is missing, surplus, wrongly shaped or of a dtype that
            is not a weight's.
    """
    expected = family.stored_shapes(architecture)
    missing = [name for name in expected if name not in checkpoint.tensors]
    if missing:
        raise damaged(checkpoint.directory, f"lacks {_listed(missing)}")
    surplus = [
        name
        for name in checkpoint.tensors
        if name not in expected and not family.may_be_stored(name, architecture)
    ]
    if surplus:
        raise damaged(
            checkpoint.directory,
            f"has {_listed(surplus)}, which a {architecture.hf_architecture} as in {CONFIG_NAME} has not",
        )
    for name, shape in expected.items():
        tensor = checkpoint.tensors[name]
        if tensor.shape != shape:
            found = f"tensor {name} is {list(tensor.shape)}; {CONFIG_NAME} makes it {list(shape)}"
            raise damaged(tensor.file, found)
        if tensor.dtype not in WEIGHT_DTYPES:
            raise damaged(
                tensor.file,
                f"tensor {name} is stored as {tensor.dtype}",
                f"supported are {', '.join(WEIGHT_DTYPES)}: choose a checkpoint that is not quantised",
            )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{'tensor' if len(names) == 1 else 'tensors'} {', '.join(names[:3])}{more}"


def check_checkpoint(hf_dir: Path, *, finite: bool = True) -> Architecture:
    """Checks a directory before a program gets it that would not notice.

    Args:
        hf_dir: The Hugging Face directory.
        finite: Read all values and refuse NaN and infinities.

    Returns:
        What its config.json says.

    Raises:
        CheckpointError: Configuration, files, tensors or values are not what they must be.
    """
    refuse_strange_links(hf_dir)
    architecture = architecture_of(hf_dir)
    checkpoint = open_model(hf_dir, architecture)
    if finite:
        _check_finite(checkpoint)
    return architecture


def all_finite(bits: np.ndarray, dtype: str) -> bool:
    """Whether no value is NaN or infinite: none has an exponent of ones alone.

    Args:
        bits: Values of the stored type, as integers of any size or bytes, contiguous.
        dtype: Their type, as safetensors spells it.
    """
    kind, exponent = _EXPONENTS[dtype]
    values = bits.reshape(-1).view(kind)
    return not values.size or int(np.bitwise_and(values, np.asarray(exponent, kind)).max()) != exponent


def _check_finite(checkpoint: Checkpoint) -> None:
    """Reads all values, in the process of the command itself.

    A file that is mapped would have the process killed where a disk fails; a read raises.
    """
    work = [
        (name, start)
        for name, tensor in checkpoint.tensors.items()
        if tensor.dtype in _EXPONENTS
        for start in range(0, tensor.size, _CHECK_BYTES)
    ]

    of_thread = threading.local()

    def is_finite(part: tuple[str, int]) -> bool:
        name, start = part
        tensor = checkpoint.tensors[name]
        if not hasattr(of_thread, "buffer"):
            of_thread.buffer = np.empty(_CHECK_BYTES, np.uint8)
        values = of_thread.buffer[: min(_CHECK_BYTES, tensor.size - start)]
        _read_bytes(tensor.file, descriptors[tensor.file], tensor.offset + start, values)
        return all_finite(values, tensor.dtype)

    with contextlib.ExitStack() as stack:
        files = {tensor.file for tensor in checkpoint.tensors.values()}
        descriptors = {file: stack.enter_context(file.open("rb", buffering=0)).fileno() for file in files}
        pool = stack.enter_context(ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)))
        for (name, _), good in zip(work, pool.map(is_finite, work), strict=True):
            if not good:
                pool.shutdown(cancel_futures=True)
                raise damaged(
                    checkpoint.tensors[name].file,
                    f"tensor {name} holds NaN or infinite values",
                    "the training that wrote it diverged (lower the learning rate), or the file was damaged",
                )


def _read_bytes(file: Path, descriptor: int, offset: int, into: np.ndarray) -> None:
    """Fills `into`: [size], uint8.

    Raises:
        CheckpointError: The file system does not answer, or the file ends earlier than its header said.
    """
    done = 0
    while done < into.size:
        try:
            count = os.preadv(descriptor, [into.data[done:]], offset + done)
        except OSError as error:
            raise damaged(file, f"cannot be read ({error.strerror or error})") from error
        if count == 0:
            raise damaged(file, f"ends at byte {offset + done}, before the last tensor: truncated meanwhile")
        done += count


def num_parameters(hf_dir: Path) -> int:
    """Numbers in all tensors of a checkpoint, by its headers."""
    return sum(math.prod(tensor.shape) for tensor in open_checkpoint(hf_dir).tensors.values())


def _content_files(hf_dir: Path) -> Iterator[str]:
    """Files that decide what a model answers: configuration, weights, tokenizer."""
    for name in (CONFIG_NAME, GENERATION_CONFIG_NAME, INDEX_NAME, *TOKENIZER_FILES):
        if (hf_dir / name).is_file():
            yield name
    yield from sorted({tensor.file.name for tensor in open_checkpoint(hf_dir).tensors.values()})


def weights_sha256(hf_dir: Path) -> str:
    """One hash for what a model is: configuration, weights and tokenizer.

    Where we exported the directory, its manifest has the files' hashes already.

    Raises:
        CheckpointError: The directory is no readable checkpoint.
    """
    hf_dir = Path(hf_dir)
    names = list(_content_files(hf_dir))
    hashes = _known_hashes(hf_dir, names)
    rest = [hf_dir / name for name in names if name not in hashes]
    hashes |= {path.name: digest for path, digest in sha256_files(rest).items()}
    return sha256_text("".join(f"{hashes[name]}  {name}\n" for name in sorted(names)))


def _known_hashes(hf_dir: Path, names: list[str]) -> dict[str, str]:
    """What our manifest says about files whose size is still that; nothing where it is not ours."""
    try:
        manifest = read_manifest(hf_dir)
        files = manifest.files if manifest is not None else {}
        return {
            name: str(files[name]["sha256"])
            for name in names
            if name in files and files[name]["size"] == (hf_dir / name).stat().st_size
        }
    except (DataError, TypeError, KeyError):
        return {}
