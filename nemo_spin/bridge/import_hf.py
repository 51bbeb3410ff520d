"""Hugging Face weights into Megatron's parameters: every rank reads what it holds, no more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from nemo_spin.bridge.agreement import together
from nemo_spin.bridge.checkpoint_files import Checkpoint, all_finite, open_model
from nemo_spin.bridge.placement import Placed, bits_to_tensor, place, row_blocks, view
from nemo_spin.bridge.safetensors_format import ITEM_SIZES, damaged
from nemo_spin.megatron.architecture import Architecture


def load_weights(model_chunks: Sequence[nn.Module], hf_dir: Path, architecture: Architecture) -> None:
    """Fills this rank's parameters from a Hugging Face directory. All ranks must call.

    Values are converted to the type of each parameter. Rows that pad the vocabulary are
    zero. Beyond its parameters a rank holds one block of a tensor.

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

    def fill() -> None:
        for placed in parameters:
            _fill(placed, checkpoint)

    together(fill)


@torch.no_grad()
def _fill(placed: Placed, checkpoint: Checkpoint) -> None:
    covered = sum(view(placed.parameter, piece).numel() for piece in placed.pieces)
    if covered < placed.parameter.numel():
        placed.parameter.zero_()
    for piece in placed.pieces:
        stored = checkpoint.tensors[piece.tensor]
        for block in row_blocks(piece, ITEM_SIZES[stored.dtype]):
            bits = checkpoint.read(piece.tensor, block.stored)
            if not all_finite(bits, stored.dtype):
                raise damaged(stored.file, f"tensor {piece.tensor} holds NaN or infinite values")
            target = view(placed.parameter, block)
            target.copy_(bits_to_tensor(bits, stored.dtype).to(target.dtype))
