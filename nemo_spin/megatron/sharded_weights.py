"""A model's weights alone as a Megatron distributed checkpoint, for any layout to load.

Only tensors are stored. What Transformer Engine keeps beside them (scales of FP8) starts anew, so
that nothing has to be unpickled; the index that torch's format pickles is looked through before
it is opened, because a file may come from a stranger.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import distributed, nn
from torch.distributed.checkpoint.api import CheckpointException  # no Exception: a BaseException

from nemo_spin.errors import CheckpointError, explain

_INDEX = ".metadata"
_EXTRA_STATE = "_extra_state"
_METADATA = (
    "Metadata",
    "MetadataIndex",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
)
_PLANNER = ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")
# What describes tensors and files, and runs nothing when it is made. By full name: a module would
# also give what it imports.
_HARMLESS = {
    *(("torch.distributed.checkpoint.metadata", name) for name in _METADATA),
    *(("torch.distributed.checkpoint.planner", name) for name in _PLANNER),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


def save_sharded_weights(chunks: Sequence[nn.Module], directory: Path) -> None:
    """Writes all weights into `directory`, which is there and empty. All ranks must call."""
    dist_checkpointing.save(_sharded(chunks), str(directory), ("torch_dist", 1))
    distributed.barrier()


def load_sharded_weights(chunks: Sequence[nn.Module], directory: Path) -> None:
    """Fills `chunks`, at whichever layout they are. All ranks must call.

    Raises:
        CheckpointError: The files cannot be read, are of another model, or hold more than tensors.
    """
    _check_index(directory / _INDEX)
    try:
        loaded = dist_checkpointing.load(_sharded(chunks), str(directory))
        for index, chunk in enumerate(chunks):
            module = getattr(chunk, "module", chunk)
            take_tensors(module, loaded[f"model{index}"])
    except (Exception, CheckpointException) as error:
        lines = str(error).splitlines()
        raise _unreadable(directory, f"cannot be loaded ({lines[-1] if lines else error!r})") from error


def _sharded(chunks: Sequence[nn.Module]) -> dict[str, Any]:
    state = {}
    for index, chunk in enumerate(chunks):
        module: Any = getattr(chunk, "module", chunk)
        state[f"model{index}"] = only_tensors(module.sharded_state_dict())
    return state


def only_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """Of a module's sharded state what is tensors; the rest would have to be unpickled."""
    return {
        name: entry
        for name, entry in state.items()
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }


def take_tensors(module: nn.Module, loaded: dict[str, Any]) -> None:
    """Fills a module with what `only_tensors` described.

    Raises:
        KeyError: Tensors are missing, or there are others.
    """
    missing, unexpected = module.load_state_dict(loaded, strict=False)
    lacking = [name for name in missing if not name.endswith(_EXTRA_STATE)]
    if lacking or unexpected:
        raise KeyError(f"tensors that do not fit: {[*lacking, *unexpected]}")


class _IndexReader(pickle.Unpickler):
    """Makes what an index of tensors is made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _HARMLESS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"names {module}.{name}")


def _check_index(path: Path) -> None:
    """Reads the index with harmless classes only.

    Raises:
        CheckpointError: There is none, or it asks for others.
    """
    try:
        _IndexReader(io.BytesIO(path.read_bytes())).load()
    except Exception as error:
        raise _unreadable(path, f"is no index of tensors ({type(error).__name__}: {error})") from error


def _unreadable(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        explain(
            str(path),
            found=found,
            rule="the weights of the same model, as nemo_spin writes them",
            remedy="copy the file again from where it was made",
        )
    )
