"""Adapters into a directory that `peft` and vLLM load: `adapter_config.json` and its tensors.

An adapter of one Hugging Face projection is one adapter of ours (`megatron/lora.py`), so that nothing
is converted but the place of the rows and columns that a rank holds. Adapters of several iterations
are one: B_0 A_0 + B_1 A_1 = [B_0 B_1] [A_0; A_1], of as many times the rank and alpha.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import distributed, nn

from nemo_spin.bridge.checkpoint_files import Checkpoint
from nemo_spin.bridge.export_files import ExportPlan, WeightFile, create_files, files_in
from nemo_spin.bridge.export_hf import compare_placed, storage_errors, write_placed
from nemo_spin.bridge.mappings import Piece, Region, Shape, whole
from nemo_spin.bridge.peft_files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    adapter_shapes,
    peft_config,
    projection_names,
    tensor_name,
)
from nemo_spin.bridge.placement import STORED_DTYPES, Placed, bits_to_tensor
from nemo_spin.bridge.safetensors_format import damaged, layout, read_header
from nemo_spin.config.schema import LoraConfig
from nemo_spin.data.files import Manifest, atomic_directory, write_manifest
from nemo_spin.data.progress import SilentProgress
from nemo_spin.megatron.agreement import from_first_rank, together
from nemo_spin.megatron.architecture import Architecture
from nemo_spin.megatron.lora import Adapters, all_adapters

_OUTER_AXIS = {"A": 1, "B": 0}  # of inputs or outputs; the other one has the rank


def _place(adapters: Adapters, names: Mapping[str, str], earlier: Checkpoint | None) -> list[Placed]:
    """The parameters of one linear's adapters, after those in `earlier`, and where they are stored."""
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    is_first_replica = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    placed = []
    for name, adapter in adapters.items():
        module = names[name].format(layer=adapters.layer)
        for letter, parameter in (("A", adapter.a), ("B", adapter.b)):
            tensor, axis = tensor_name(module, letter), _OUTER_AXIS[letter]
            is_split = (letter == "B") == adapters.is_column_parallel
            parts, part = (tp_size, tp_rank) if is_split else (1, 0)
            values = parameter.detach()
            if earlier is not None:
                region = _region(earlier.tensors[tensor].shape, axis, part, size=values.shape[axis])
                before = bits_to_tensor(earlier.read(tensor, region), earlier.tensors[tensor].dtype)
                values = torch.cat([before.to(values.device), values], dim=1 - axis)
            shape = tuple(values.shape)
            pieces = [
                (Piece(tensor, _region(shape, axis, number, size=shape[axis]), whole(shape)),)
                for number in range(parts)
            ]
            spread = tuple(pieces) if axis == 1 and parts > 1 else ()
            placed.append(
                Placed(
                    tensor,
                    values,
                    pieces[part],
                    is_writer=part == tp_rank,
                    is_first_replica=is_first_replica,
                    spread=spread,
                )
            )
    return placed


def _region(shape: Shape, axis: int, part: int, *, size: int) -> Region:
    """All of a tensor, but along `axis` the part with number `part` of those that have `size`."""
    region = list(whole(shape))
    region[axis] = (part * size, (part + 1) * size)
    return tuple(region)


def _open_earlier(
    directory: Path, architecture: Architecture, lora: LoraConfig, *, dtype: str
) -> tuple[Checkpoint, int]:
    """An adapter that another is added to, and how many are in it already.

    Raises:
        CheckpointError: It is not there, or was made with other settings.
    """
    path = directory / WEIGHTS_NAME
    tensors = read_header(path)
    assert lora.rank is not None, "without a rank there are no adapters"
    count = max((tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name), default=0)
    count //= lora.rank
    expected = adapter_shapes(architecture, lora, count=count)
    if {name: tensor.shape for name, tensor in tensors.items()} != expected or any(
        tensor.dtype != dtype for tensor in tensors.values()
    ):
        raise damaged(
            path,
            f"is no adapter of rank {lora.rank} beside the layers of model.lora, in {dtype}",
            "export the iteration before again, with the same model.lora and trainer.precision",
        )
    return Checkpoint(directory, tensors), count


def export_adapter(
    model_chunks: Sequence[nn.Module],
    lora: LoraConfig,
    *,
    architecture: Architecture,
    base: Path,
    out_dir: Path,
    dtype: torch.dtype,
    inputs: Mapping[str, Any],
    earlier: Path | None = None,
) -> Manifest | None:
    """Writes the adapters of a model as `peft` does, reads them back and adds a manifest.

    All ranks must call. An earlier `out_dir` is replaced when the new one is complete.

    Args:
        model_chunks: This rank's share, with adapters, wrapped or not.
        lora: The settings that the adapters were made with.
        architecture: Of the model.
        base: Hugging Face directory of the model without the adapters (and without those in `earlier`).
        out_dir: The new directory, on a file system that all ranks share.
        dtype: Type of the adapters' parameters, in which they are stored.
        inputs: What the result depends on, for the manifest.
        earlier: Adapter directory of the iterations before; what it holds becomes a part of this one.

    Returns:
        The manifest on rank 0, None on the others.

    Raises:
        CheckpointError: The family stores several projections as one tensor, or `earlier` does not fit.
        ExportError: A file could not be written, or reads back differently.
    """
    names, stored = projection_names(architecture, lora), STORED_DTYPES[dtype]
    before, count = None, 0
    if earlier is not None:
        before, count = together(partial(_open_earlier, earlier, architecture, lora, dtype=stored))
    shapes = adapter_shapes(architecture, lora, count=count + 1)
    header, places = layout(shapes, stored, Path(WEIGHTS_NAME))
    size = len(header) + sum(entry.size for entry in places.values())
    plan = ExportPlan(stored, {WEIGHTS_NAME: WeightFile(header, size)}, places, None)
    parameters = [
        placed for adapters in all_adapters(model_chunks) for placed in _place(adapters, names, before)
    ]
    is_first = distributed.get_rank() == 0
    with contextlib.ExitStack() as stack:

        def begin() -> Path:
            with storage_errors(out_dir):
                directory = stack.enter_context(atomic_directory(out_dir))
                create_files(plan, directory)
                config = peft_config(lora, list(names.values()), base=base, count=count + 1)
                text = json.dumps(config, indent=2)
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
                counts = {"tensors": len(places), "bytes": size - len(header), "adapters": count + 1}
                return write_manifest(
                    directory, stage="export", files=files_in(directory), inputs=inputs, counts=counts
                )

        directory = from_first_rank(begin)
        together(write)
        together(compare)
        manifest = together(finish)
        together(stack.close)
    return manifest
