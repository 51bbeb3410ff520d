"""Hugging Face weights into Megatron's parameters: of what replicas hold, each reads a share."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from nemo_spin.bridge.checkpoint_files import Checkpoint, all_finite, open_model
from nemo_spin.bridge.mappings import Piece
from nemo_spin.bridge.placement import Placed, bits_to_tensor, place, row_blocks, view
from nemo_spin.bridge.replicas import hand_round, own_share
from nemo_spin.bridge.safetensors_format import ITEM_SIZES, damaged
from nemo_spin.megatron.agreement import together
from nemo_spin.megatron.architecture import Architecture

_READERS = 2  # threads, each with a block: one reads while another looks for NaN and copies


def load_weights(model_chunks: Sequence[nn.Module], hf_dir: Path, architecture: Architecture) -> None:
    """Fills this rank's parameters from a Hugging Face directory. All ranks must call.

    Values are converted to the type of each parameter. Rows that pad the vocabulary are
    zero. Beyond its parameters a rank holds a few blocks of tensors. What data-parallel replicas
    hold in common is read once and sent to the others: storage is read once, however many there are.

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
    together(lambda: _fill(own_share(parameters), checkpoint))
    hand_round(parameters)


@torch.no_grad()
def _fill(parameters: Sequence[Placed], checkpoint: Checkpoint) -> None:
    for placed in parameters:
        covered = sum(view(placed.parameter, piece).numel() for piece in placed.pieces)
        if covered < placed.parameter.numel():
            placed.parameter.zero_()
    blocks = sorted(
        (
            (placed, block)
            for placed in parameters
            for piece in placed.pieces
            for block in row_blocks(piece, ITEM_SIZES[checkpoint.tensors[piece.tensor].dtype])
        ),
        key=lambda entry: checkpoint.position(entry[1].tensor, entry[1].stored),  # as a disk likes it
    )
    with ThreadPoolExecutor(_READERS) as pool:
        copied = [pool.submit(_copy, placed, block, checkpoint) for placed, block in blocks]
        try:
            for each in copied:
                each.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@torch.no_grad()  # of this thread
def _copy(placed: Placed, block: Piece, checkpoint: Checkpoint) -> None:
    stored = checkpoint.tensors[block.tensor]
    checkpoint.ask_for(block.tensor, block.stored)
    bits = checkpoint.read(block.tensor, block.stored)
    if not all_finite(bits, stored.dtype):
        raise damaged(stored.file, f"tensor {block.tensor} holds NaN or infinite values")
    view(placed.parameter, block).copy_(bits_to_tensor(bits, stored.dtype))
