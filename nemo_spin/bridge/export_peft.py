"""Adapters into a directory that `peft` and vLLM load: `adapter_config.json` and its tensors.

An adapter of one Hugging Face projection is one adapter of ours (`megatron/lora.py`), so that nothing
is converted but the place of the rows and columns that a rank holds.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import distributed, nn

from nemo_spin.bridge.agreement import from_first_rank, together
from nemo_spin.bridge.checkpoint_files import Checkpoint
from nemo_spin.bridge.export_files import ExportPlan, WeightFile, create_files, files_in
from nemo_spin.bridge.export_hf import compare_placed, storage_errors, write_placed
from nemo_spin.bridge.mappings import Piece, whole
from nemo_spin.bridge.peft_files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    adapter_shapes,
    peft_config,
    projection_names,
    tensor_name,
)
from nemo_spin.bridge.placement import STORED_DTYPES, Placed
from nemo_spin.bridge.safetensors_format import layout, read_header
from nemo_spin.config.schema import LoraConfig
from nemo_spin.data.files import Manifest, atomic_directory, write_manifest
from nemo_spin.data.progress import SilentProgress
from nemo_spin.megatron.architecture import Architecture
from nemo_spin.megatron.lora import Adapters, all_adapters


def _place(adapters: Adapters, names: Mapping[str, str]) -> list[Placed]:
    """The parameters of one linear's adapters, and where they are stored."""
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    placed = []
    for name, adapter in adapters.items():
        module = names[name].format(layer=adapters.layer)
        for letter, parameter in (("A", adapter.a), ("B", adapter.b)):
            tensor, shape = tensor_name(module, letter), tuple(parameter.shape)
            axis = {"A": 1, "B": 0}[letter]
            if (letter == "B") != adapters.is_column_parallel:  # whole on every rank
                piece = Piece(tensor, whole(shape), whole(shape))
                placed.append(Placed(tensor, parameter, (piece,), is_writer=tp_rank == 0))
                continue
            pieces = [(_part(tensor, shape, axis, rank),) for rank in range(tp_size)]
            spread = tuple(pieces) if axis == 1 and tp_size > 1 else ()
            placed.append(Placed(tensor, parameter, pieces[tp_rank], is_writer=True, spread=spread))
    return placed


def _part(tensor: str, shape: tuple[int, ...], axis: int, rank: int) -> Piece:
    """What tensor-parallel rank `rank` holds of a tensor whose parts of `shape` lie along `axis`."""
    stored = list(whole(shape))
    stored[axis] = (rank * shape[axis], (rank + 1) * shape[axis])
    return Piece(tensor, tuple(stored), whole(shape))


def export_adapter(
    model_chunks: Sequence[nn.Module],
    lora: LoraConfig,
    *,
    architecture: Architecture,
    base: Path,
    out_dir: Path,
    dtype: torch.dtype,
    inputs: Mapping[str, Any],
) -> Manifest | None:
    """Writes the adapters of a model as `peft` does, reads them back and adds a manifest.

    All ranks must call. An earlier `out_dir` is replaced when the new one is complete.

    Args:
        model_chunks: This rank's share, with adapters, wrapped or not.
        lora: The settings that the adapters were made with.
        architecture: Of the model.
        base: Hugging Face directory of the model without the adapters.
        out_dir: The new directory, on a file system that all ranks share.
        dtype: Type of the adapters' parameters, in which they are stored.
        inputs: What the result depends on, for the manifest.

    Returns:
        The manifest on rank 0, None on the others.

    Raises:
        CheckpointError: The family stores several projections as one tensor.
        ExportError: A file could not be written, or reads back differently.
    """
    names = projection_names(architecture, lora)
    header, places = layout(adapter_shapes(architecture, lora), STORED_DTYPES[dtype], Path(WEIGHTS_NAME))
    size = len(header) + sum(entry.size for entry in places.values())
    plan = ExportPlan(STORED_DTYPES[dtype], {WEIGHTS_NAME: WeightFile(header, size)}, places, None)
    parameters = [placed for adapters in all_adapters(model_chunks) for placed in _place(adapters, names)]
    is_first = distributed.get_rank() == 0
    with contextlib.ExitStack() as stack:

        def begin() -> Path:
            if not is_first:
                return out_dir  # told below where to write
            with storage_errors(out_dir):
                directory = stack.enter_context(atomic_directory(out_dir))
                create_files(plan, directory)
                text = json.dumps(peft_config(lora, list(names.values()), base=base), indent=2)
                (directory / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
            return directory

        def write() -> None:
            with storage_errors(out_dir):
                write_placed(parameters, plan, directory=directory, progress=SilentProgress())

        def compare() -> None:
            compare_placed(parameters, Checkpoint(directory, read_header(directory / WEIGHTS_NAME)))

        def finish() -> Manifest | None:
            if not is_first:
                return None
            with storage_errors(out_dir):
                counts = {"tensors": len(places), "bytes": size - len(header), "rank": lora.rank}
                return write_manifest(
                    directory, stage="export", files=files_in(directory), inputs=inputs, counts=counts
                )

        directory = from_first_rank(together(begin))
        together(write)
        together(compare)
        manifest = together(finish)
        together(stack.close)
    return manifest
