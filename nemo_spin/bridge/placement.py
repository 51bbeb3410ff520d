"""Which parameters a rank holds, and what stored tensors they are made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from nemo_spin.bridge.families import family_of
from nemo_spin.bridge.mappings import Mapping, Piece, Share
from nemo_spin.errors import CheckpointError, explain
from nemo_spin.megatron.architecture import Architecture
from nemo_spin.megatron.lora import is_adapter

BLOCK_BYTES = 8 << 20  # most that is copied at once
TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
STORED_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_BIT_TYPES = {2: torch.int16, 4: torch.int32}
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"local_experts\.(\d+)\.")
_TRANSFORMER_ENGINE_NAMES = {  # its layers hold the norm before them
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclass(frozen=True)
class Placed:
    """A parameter of this rank.

    Attributes:
        name: As the local layer spec calls it, with the layer's number in the whole model.
        parameter: [rows, columns] or [rows]: this rank's share.
        pieces: Where its values are stored.
        is_writer: Whether this rank exports them, of those that hold one replica.
        is_first_replica: Whether this rank is of the first of the data-parallel replicas.
        spread: The pieces of every tensor-parallel rank, where a stored row is made of several:
            of all ranks, or of parts of this one's parameter. Empty where no row is.
        replicas: Process group of the ranks that hold the same values; None where it is not known.
    """

    name: str
    parameter: Tensor
    pieces: tuple[Piece, ...]
    is_writer: bool
    is_first_replica: bool
    spread: tuple[tuple[Piece, ...], ...] = ()
    replicas: Any = None


def unwrapped(chunk: nn.Module) -> nn.Module:
    """The GPTModel inside wrappers for data parallelism and half precision."""
    while isinstance(getattr(chunk, "module", None), nn.Module):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def place(model_chunks: Sequence[nn.Module], architecture: Architecture) -> list[Placed]:
    """All parameters of this rank but adapters', in the model's order, the same on all TP ranks.

    Raises:
        CheckpointError: A parameter is not in the family's table, or has another shape
            than the architecture gives it.
    """
    return [
        _placed(name, parameter, chunk=chunk, architecture=architecture)
        for chunk in map(unwrapped, model_chunks)
        for name, parameter in chunk.named_parameters()
        if not is_adapter(name)
    ]


def _placed(name: str, parameter: Tensor, *, chunk: nn.Module, architecture: Architecture) -> Placed:
    layer, canonical = _canonical(name, chunk)
    expert, canonical = _expert(canonical, architecture)
    mapping = family_of(architecture).parameter(canonical, layer, architecture, expert=expert)
    if mapping is None:
        raise _unplaceable(name, architecture, "is in no row of the family's table")
    share = Share(0, 1)
    if expert is None:
        share = Share(
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        )
    vocab_rows = parameter.shape[0]
    expected = mapping.local_shape(architecture, share, vocab_rows)
    is_vocabulary = canonical in ("embedding.word_embeddings.weight", "output_layer.weight")
    too_few = is_vocabulary and vocab_rows * share.tp_size < architecture.vocab_size
    if tuple(parameter.shape) != expected or too_few:
        raise _unplaceable(name, architecture, f"is {list(parameter.shape)} instead of {list(expected)}")
    is_copy = canonical == "output_layer.weight" and architecture.tie_word_embeddings
    return Placed(
        name=mapping.megatron,
        parameter=parameter,
        pieces=tuple(mapping.pieces(architecture, share, vocab_rows)),
        is_writer=mapping.is_writer(share) and not is_copy,
        is_first_replica=_is_first_replica(expert),
        spread=_spread(mapping, architecture, share.tp_size, vocab_rows),
        replicas=_replicas(expert),
    )


def _spread(
    mapping: Mapping, architecture: Architecture, tp_size: int, vocab_rows: int
) -> tuple[tuple[Piece, ...], ...]:
    shapes = mapping.stored_shapes(architecture)
    of_ranks = tuple(
        tuple(mapping.pieces(architecture, Share(rank, tp_size), vocab_rows)) for rank in range(tp_size)
    )
    has_parts = any(
        stop - start < size
        for pieces in of_ranks
        for piece in pieces
        for (start, stop), size in zip(piece.stored[1:], shapes[piece.tensor][1:], strict=True)
    )
    return of_ranks if has_parts else ()


def _canonical(name: str, chunk: nn.Module) -> tuple[int | None, str]:
    """The number of the layer in the whole model, and the name as the tables have it."""
    match = _LAYER.match(name)
    if match is None:
        return None, name
    layer: Any = chunk.get_submodule(match.group(0).rstrip("."))
    rest = name[match.end() :]
    return int(
        layer.layer_number
    ) - 1, f"decoder.layers.{{layer}}.{_TRANSFORMER_ENGINE_NAMES.get(rest, rest)}"


def _expert(name: str, architecture: Architecture) -> tuple[int | None, str]:
    """The number of the expert in the whole layer, and the name as the tables have it."""
    match = _EXPERT.search(name)
    if match is None:
        return None, name
    held = architecture.num_experts // parallel_state.get_expert_model_parallel_world_size()
    first = parallel_state.get_expert_model_parallel_rank() * held
    return first + int(match.group(1)), _EXPERT.sub("local_experts.{expert}.", name)


def _is_first_replica(expert: int | None) -> bool:
    if expert is not None:
        return bool(parallel_state.get_expert_data_parallel_rank() == 0)
    return bool(parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0)


def _replicas(expert: int | None) -> Any:
    if expert is not None:
        return parallel_state.get_expert_data_parallel_group()
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _unplaceable(name: str, architecture: Architecture, found: str) -> CheckpointError:
    return CheckpointError(
        explain(
            f"parameter {name}",
            found=found,
            rule=f"the model is a {architecture.hf_architecture} as its config.json describes it",
            remedy="this is a defect of the model provider or of bridge/families, please report it",
        )
    )


def bits_to_tensor(bits: np.ndarray, stored_dtype: str) -> Tensor:
    """Stored bits as a tensor of their dtype, on the CPU."""
    return torch.from_numpy(bits).view(TORCH_DTYPES[stored_dtype])


def tensor_to_bits(tensor: Tensor) -> np.ndarray:
    """The bits of a tensor as signed integers of its item size, contiguous, on the CPU."""
    return tensor.detach().contiguous().view(_BIT_TYPES[tensor.element_size()]).cpu().numpy()


def row_blocks(piece: Piece, item_size: int) -> list[Piece]:
    """The piece, cut by rows into parts of at most `BLOCK_BYTES` (or one row)."""
    (first, last), *columns = piece.stored
    row_bytes = item_size * (columns[0][1] - columns[0][0] if columns else 1)
    rows = max(1, BLOCK_BYTES // max(1, row_bytes))
    axis = 1 if piece.transposed else 0
    shift = piece.local[axis][0] - first
    blocks = []
    for start in range(first, last, rows):
        stop = min(start + rows, last)
        local = [*piece.local]
        local[axis] = (start + shift, stop + shift)
        blocks.append(replace(piece, stored=((start, stop), *piece.stored[1:]), local=tuple(local)))
    return blocks


def view(parameter: Tensor, piece: Piece) -> Tensor:
    """The region of the parameter that the piece is about, its axes as they are stored."""
    region = parameter.detach()[tuple(slice(*bounds) for bounds in piece.local)]
    return region.T if piece.transposed else region
