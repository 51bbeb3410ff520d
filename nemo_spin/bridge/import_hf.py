"""Hugging Face weights into Megatron's parameters: every rank reads what it holds, no more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nemo_spin.bridge.agreement import together
from nemo_spin.bridge.checkpoint_files import Checkpoint, all_finite, open_model
from nemo_spin.bridge.mappings import Piece
from nemo_spin.bridge.placement import Placed, bits_to_tensor, place, row_blocks, view
from nemo_spin.bridge.safetensors_format import ITEM_SIZES, damaged
from nemo_spin.megatron.architecture import Architecture

_READERS = 2  # threads, each with a block: reading, and looking for NaN, goes on beside the copying


def load_weights(model_chunks: Sequence[nn.Module], hf_dir: Path, architecture: Architecture) -> None:
    """Fills this rank's parameters from a Hugging Face directory. All ranks must call.

    Values are converted to the type of each parameter. Rows that pad the vocabulary are
    zero. Beyond its parameters a rank holds a few blocks of tensors.

    Args:
        model_chunks: What the provider built, wrapped or not.
        hf_dir: Directory with safetensors.
        architecture: What its config.json says.

    Raises:
        CheckpointError: The files do not hold what the configuration promises; found
            before any parameter is changed, but for NaN and infinite values.
    """

    def prepare() -> tuple[Checkpoint, list[Placed]]:
        checkpoint = open_model(hf_dir, architecture)
        return checkpoint, place(model_chunks, architecture)

    checkpoint, parameters = together(prepare)

    together(lambda: _fill(parameters, checkpoint))


@torch.no_grad()
def _fill(parameters: Sequence[Placed], checkpoint: Checkpoint) -> None:
    for placed in parameters:
        covered = sum(view(placed.parameter, piece).numel() for piece in placed.pieces)
        if covered < placed.parameter.numel():
            placed.parameter.zero_()
    blocks = [
        (placed, block)
        for placed in parameters
        for piece in placed.pieces
        for block in row_blocks(piece, ITEM_SIZES[checkpoint.tensors[piece.tensor].dtype])
    ]
    for placed, block, bits in _read_ahead(blocks, checkpoint):
        target = view(placed.parameter, block)
        target.copy_(bits_to_tensor(bits, checkpoint.tensors[block.tensor].dtype).to(target.dtype))


def _read_ahead(
    blocks: Sequence[tuple[Placed, Piece]], checkpoint: Checkpoint
) -> Iterator[tuple[Placed, Piece, np.ndarray]]:
    """The blocks with their bits, in order; the next ones are read while one is being copied."""

    def read(block: Piece) -> np.ndarray:
        stored = checkpoint.tensors[block.tensor]
        bits = checkpoint.read(block.tensor, block.stored)
        if not all_finite(bits, stored.dtype):
            raise damaged(stored.file, f"tensor {block.tensor} holds NaN or infinite values")
        return bits

    with ThreadPoolExecutor(_READERS) as pool:
        coming = [pool.submit(read, block) for _, block in blocks[:_READERS]]
        for position, (placed, block) in enumerate(blocks):
            bits = coming.pop(0).result()
            for _, later in blocks[position + _READERS : position + _READERS + 1]:
                coming.append(pool.submit(read, later))
            yield placed, block, bits
