"""Megatron's parameters into a Hugging Face directory, written by the ranks that hold them.

Every tensor's place in the files is known beforehand (`export_files.plan_export`), so a
rank writes its rows where they belong and no rank collects a tensor. Only where a stored
row is spread over the tensor-parallel ranks are blocks of rows brought together first.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor, distributed, nn

from nemo_spin.bridge.checkpoint_files import Checkpoint, open_model
from nemo_spin.bridge.companions import copy_companions
from nemo_spin.bridge.export_files import (
    CARD_NAME,
    MAX_SHARD_BYTES,
    ExportPlan,
    base_model,
    create_files,
    files_in,
    model_card,
    plan_export,
)
from nemo_spin.bridge.families import family_of
from nemo_spin.bridge.mappings import Piece
from nemo_spin.bridge.placement import (
    STORED_DTYPES,
    TORCH_DTYPES,
    Placed,
    place,
    row_blocks,
    tensor_to_bits,
    view,
)
from nemo_spin.bridge.replicas import own_share
from nemo_spin.bridge.safetensors_format import DTYPE_OF, ITEM_SIZES, StoredTensor
from nemo_spin.bridge.writer import BlockWriter
from nemo_spin.data.files import Manifest, atomic_directory, sha256_files, write_manifest
from nemo_spin.data.progress import Progress
from nemo_spin.errors import ExportError, explain
from nemo_spin.megatron.agreement import from_first_rank, merged, together
from nemo_spin.megatron.architecture import Architecture


def export_weights(
    model_chunks: Sequence[nn.Module],
    *,
    architecture: Architecture,
    source_dir: Path,
    out_dir: Path,
    dtype: torch.dtype | None = None,
    progress: Progress,
    extra: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    gate: Callable[[Path], None] | None = None,
) -> Manifest | None:
    """Writes the model as a Hugging Face directory with a manifest. All ranks must call.

    The bytes depend on the weights and the arguments, not on the parallel sizes. An
    earlier `out_dir` is replaced when the new one is complete; on any error it stays.

    Args:
        model_chunks: This rank's share, wrapped or not.
        architecture: What the config.json in `source_dir` says.
        source_dir: Checkpoint that the model came from: configuration, tokenizer and chat
            template are copied from it.
        out_dir: The new directory, on a file system that all ranks share.
        dtype: Type to store; None: the source's (its configuration's, else its weights').
        progress: Told how many of this rank's tensors are written.
        extra: Facts for the model card and the manifest's counts, such as `iteration`;
            `base_model` is derived where it is not given, and `inputs` is no fact but becomes
            the manifest's inputs.
        max_shard_bytes: Data in one file at most, unless a single tensor is larger.
        gate: Called on all ranks with the directory once all weights are written, before it has its
            name and a manifest: where it raises (on all ranks, as `verify_export` does), nothing stays.

    Returns:
        The manifest on rank 0, None on the others.

    Raises:
        CheckpointError: The source cannot be read, or the model does not fit it.
        ExportError: A file could not be written, or the gate found a difference.
    """
    source_dir, out_dir = Path(source_dir), Path(out_dir).resolve()  # a link keeps pointing where it does
    is_first = not distributed.is_initialized() or distributed.get_rank() == 0

    def prepare() -> tuple[ExportPlan, list[Placed]]:
        shapes = family_of(architecture).stored_shapes(architecture)
        stored = STORED_DTYPES[dtype] if dtype is not None else source_dtype(source_dir, architecture)
        plan = plan_export(shapes, dtype=stored, max_shard_bytes=max_shard_bytes)
        return plan, place(model_chunks, architecture)

    plan, parameters = together(prepare)
    with contextlib.ExitStack() as stack:  # on rank 0 it holds the unfinished directory

        def begin() -> Path:
            with storage_errors(out_dir):
                directory = stack.enter_context(atomic_directory(out_dir))
                create_files(plan, directory)
            return directory

        def write() -> None:
            with storage_errors(out_dir):
                write_placed(parameters, plan, directory=directory, progress=progress)

        def finish() -> Manifest | None:
            if not is_first:
                return None
            with storage_errors(out_dir):
                return _finish(
                    plan,
                    directory,
                    source_dir=source_dir,
                    architecture=architecture,
                    extra=extra or {},
                    hashes=hashes,
                )

        def hash_files() -> dict[str, str]:
            with storage_errors(out_dir):
                return _hashes_of_own_share(plan, directory)

        directory = from_first_rank(begin)
        together(write)
        hashes = merged(together(hash_files))
        if gate is not None:
            gate(directory)
        manifest = together(finish)
        together(stack.close)
    return manifest


def source_dtype(source_dir: Path, architecture: Architecture) -> str:
    """What an export stores where nothing else is asked for, as safetensors spells it."""
    if architecture.torch_dtype is not None:
        return DTYPE_OF[architecture.torch_dtype]
    first = next(iter(family_of(architecture).stored_shapes(architecture)))
    return open_model(source_dir, architecture).tensors[first].dtype


def _hashes_of_own_share(plan: ExportPlan, directory: Path) -> dict[str, str]:
    """File name -> sha256 for the weight files that fall to this rank: all ranks hash.

    Every rank must have made durable what it wrote, or another node may read old bytes.
    """
    is_alone = not distributed.is_initialized()
    rank, world_size = (0, 1) if is_alone else (distributed.get_rank(), distributed.get_world_size())
    own = [directory / name for name in list(plan.files)[rank::world_size]]
    return {path.name: digest for path, digest in sha256_files(own).items()}


def _finish(
    plan: ExportPlan,
    directory: Path,
    *,
    source_dir: Path,
    architecture: Architecture,
    extra: Mapping[str, Any],
    hashes: Mapping[str, str],
) -> Manifest:
    """Adds what is not weights, and the manifest, last."""
    facts = {"base_model": base_model(source_dir)}
    facts |= {key: value for key, value in extra.items() if key != "inputs"}
    inputs = extra.get("inputs", {})
    copy_companions(source_dir, directory, dtype=plan.dtype)
    data_bytes = sum(place.size for place in plan.places.values())
    num_parameters = data_bytes // ITEM_SIZES[plan.dtype]
    card = model_card(architecture, dtype=plan.dtype, num_parameters=num_parameters, extra=facts)
    (directory / CARD_NAME).write_text(card, encoding="utf-8")
    counts = {"parameters": num_parameters, "tensors": len(plan.places), "bytes": data_bytes}
    return write_manifest(
        directory,
        stage="export",
        files=files_in(directory),
        inputs=inputs,
        counts={**facts, **counts},
        hashes=hashes,
    )


@contextlib.contextmanager
def storage_errors(out_dir: Path) -> Iterator[None]:
    """Says of an error of the file system which directory could not be written."""
    try:
        yield
    except OSError as error:
        raise ExportError(
            explain(
                str(out_dir),
                found=f"could not be written ({error.strerror or error})",
                rule="an export needs room for all weights, in a directory that all ranks can write to",
                remedy="free some space (or mend the permissions) and start the same command again; "
                "an earlier export there is unharmed",
            )
        ) from error


@torch.no_grad()
def write_placed(parameters: list[Placed], plan: ExportPlan, *, directory: Path, progress: Progress) -> None:
    """Writes this rank's share. All ranks of a tensor-parallel group must call."""
    parameters = [placed for placed in parameters if placed.is_first_replica]
    writer = BlockWriter(directory)
    for done, placed in enumerate(parameters, start=1):
        blocks = _joined_blocks(placed, plan) if placed.spread else _own_blocks(placed, plan)
        for target, first_row, values in blocks:
            if placed.is_writer:
                bits = tensor_to_bits(values)
                writer.attempt(functools.partial(writer.write, target, first_row, bits))
        report = functools.partial(progress.update, done, len(parameters), "tensors")
        writer.attempt(report)
    writer.close()


Block = tuple[StoredTensor, int, Tensor]  # a tensor, the first of some of its rows, their values


def _own_blocks(placed: Placed, plan: ExportPlan) -> Iterator[Block]:
    """Whole stored rows of this rank, a few at a time."""
    for piece in placed.pieces:
        for block in row_blocks(piece, ITEM_SIZES[plan.dtype]):
            values = view(placed.parameter, block).to(TORCH_DTYPES[plan.dtype])
            yield plan.places[piece.tensor], block.stored[0][0], values


def _joined_blocks(placed: Placed, plan: ExportPlan) -> Iterator[Block]:
    """Stored rows that are spread over the tensor-parallel ranks: in each round a block for every rank.

    All exchange their parts at once and then write, each its own block. All ranks of the tensor-parallel
    group must call. A block is valid until the next one is asked for.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    tp_rank, tp_size = distributed.get_rank(group), len(placed.spread)
    one = placed.pieces[0]
    target = plan.places[one.tensor]
    dtype = TORCH_DTYPES[plan.dtype]
    rows_of_rank = placed.parameter.detach().T if one.transposed else placed.parameter.detach()
    whole = Piece(one.tensor, ((0, target.shape[0]), (0, target.shape[1])), ((0, target.shape[0]), (0, 0)))
    bounds = [block.stored[0] for block in row_blocks(whole, ITEM_SIZES[plan.dtype])]
    # Made once: memory that is taken and given back for every block piles up.
    most_rows, num_columns = bounds[0][1], rows_of_rank.shape[1]
    received = rows_of_rank.new_empty(tp_size * most_rows, num_columns, dtype=dtype)
    whole_rows = received.new_empty(most_rows, target.shape[1])
    for start in range(0, len(bounds), tp_size):
        turn = bounds[start : start + tp_size]
        sizes = [last - first for first, last in turn] + [0] * (tp_size - len(turn))
        own_rows = rows_of_rank[turn[0][0] : turn[-1][1]].to(dtype).contiguous()
        distributed.all_to_all_single(
            received[: tp_size * sizes[tp_rank]].view(torch.uint8),  # gloo does not know every type
            own_rows.view(torch.uint8),
            output_split_sizes=[sizes[tp_rank]] * tp_size,
            input_split_sizes=sizes,
            group=group,
        )
        if tp_rank >= len(turn):
            return
        rows = sizes[tp_rank]
        for part, pieces in zip(received.split(rows), placed.spread, strict=False):  # as many as ranks
            for piece in pieces:
                columns = piece.local[0 if piece.transposed else 1]
                whole_rows[:rows, slice(*piece.stored[1])] = part[:, slice(*columns)]
        yield target, turn[tp_rank][0], whole_rows[:rows]


def verify_export(model_chunks: Sequence[nn.Module], out_dir: Path, architecture: Architecture) -> None:
    """The export gate: reads an export back and compares it bit for bit. All ranks must call.

    Every rank compares what it holds, converted to the stored type; of what replicas hold, each a share.

    Raises:
        CheckpointError: The directory is not a checkpoint of this architecture.
        ExportError: A tensor differs from the model's.
    """

    def compare() -> None:
        checkpoint = open_model(out_dir, architecture)
        compare_placed(own_share(place(model_chunks, architecture)), checkpoint)

    together(compare)


def compare_placed(parameters: list[Placed], checkpoint: Checkpoint) -> None:
    """Compares parameters of this rank with what is stored, bit for bit in the stored type.

    Raises:
        ExportError: One differs.
    """
    for placed in parameters:
        for piece in placed.pieces:
            stored = checkpoint.tensors[piece.tensor]
            for block in row_blocks(piece, ITEM_SIZES[stored.dtype]):
                held = tensor_to_bits(view(placed.parameter, block).to(TORCH_DTYPES[stored.dtype]))
                if not np.array_equal(held, checkpoint.read(piece.tensor, block.stored)):
                    raise _differs(stored, block, placed)


def _differs(stored: StoredTensor, block: Piece, placed: Placed) -> ExportError:
    (first, last), *_ = block.stored
    return ExportError(
        explain(
            str(stored.file),
            found=f"tensor {block.tensor}, rows {first} to {last - 1}, differs from parameter {placed.name}",
            rule="an export read back equals the model bit for bit",
            remedy="start the same command again: it exports anew, and nothing that differs is kept; "
            "if it happens again, suspect disk or memory",
        )
    )
