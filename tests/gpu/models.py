"""Random models whose widths every GPU kernel takes, and pairs of the length of chats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from tests.distributed import reference


def make_model(directory: Path) -> Path:
    """Two layers, heads of 64 channels, every width a multiple of 64."""
    return reference.make_model(
        directory,
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        head_dim=64,
        max_position_embeddings=1024,
        initializer_range=0.05,
    )


def make_pairs(rows: int, *, opponent: float) -> pa.Table:
    """Prompts of 50 to 300 tokens, responses of 20 to 200, all opponents' sums `opponent`."""
    generator = np.random.default_rng(5)

    def column(low: int, high: int) -> pa.Array:
        sizes = generator.integers(low, high, rows)
        return pa.array([generator.integers(3, 512, size).tolist() for size in sizes], reference.IDS)

    table = pa.table(
        {"prompt_ids": column(50, 300), "real_ids": column(20, 200), "generated_ids": column(20, 200)}
    )
    return reference.with_opponent(table, torch.full((rows, 2), opponent, dtype=torch.float64))
