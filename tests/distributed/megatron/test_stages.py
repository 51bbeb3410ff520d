"""Uneven stages, and what is computed again: loss and gradients of `transformers` in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from tests.distributed import reference
from tests.distributed.megatron.test_engine import (
    BETA,
    NUM_ROWS,
    check_scores,
    check_step,
    llama,
    step,
)

__all__ = ["llama", "step"]  # fixtures


@pytest.mark.parametrize(
    ("layers", "pipeline", "model"),
    [
        (3, 2, {"num_layers_in_first_pipeline_stage": 1}),
        (3, 2, {"num_layers_in_first_pipeline_stage": 2, "num_layers_in_last_pipeline_stage": 1}),
        (4, 3, {"num_layers_in_last_pipeline_stage": 2}),
        (2, 4, {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}),
        (
            6,
            2,
            {
                "virtual_pipeline_model_parallel_size": 2,
                "num_layers_in_first_pipeline_stage": 2,
                "num_layers_in_last_pipeline_stage": 4,
            },
        ),
        (3, 2, {"virtual_pipeline_model_parallel_size": 2, "account_for_embedding_in_pipeline_split": True}),
    ],
    ids=["first", "first-and-last", "last-of-three", "ends-alone", "interleaved", "interleaved-embedding"],
)
def test_uneven_stages(tmp_path: Path, layers: int, pipeline: int, model: dict[str, Any]) -> None:
    model_dir = reference.make_model(
        tmp_path / "model", num_hidden_layers=layers, tie_word_embeddings=bool(layers % 2)
    )
    table = reference.make_pairs(NUM_ROWS)
    table = reference.with_opponent(table, torch.full((NUM_ROWS, 2), -20.0, dtype=torch.float64))
    pq.write_table(table, tmp_path / "pairs.parquet")
    loss, gradients = reference.spin_step(model_dir, table, BETA)
    step = {"table": tmp_path / "pairs.parquet", "loss": loss, "gradients": gradients}
    check_step(step, model_dir, tmp_path / "gradients", (1, pipeline, 1, False), **model)
    if layers == 6:
        check_scores(model_dir, (1, pipeline, 1, False), **model)


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        ((1, 1, 1, False), {"recompute_granularity": "selective"}),
        ((2, 1, 1, True), {"recompute_granularity": "selective", "context_parallel_size": 2}),
        (
            (2, 1, 1, True),
            {
                "recompute_granularity": "selective",
                "recompute_modules": ["core_attn", "mlp"],
                "packing": "none",
            },
        ),
        (
            (1, 1, 1, False),
            {
                "recompute_granularity": "full",
                "recompute_method": "block",
                "recompute_num_layers": 1,
                "context_parallel_size": 2,
                "packing": "pairs",
            },
        ),
        ((1, 1, 1, False), {"recompute_granularity": "full", "recompute_num_layers": 2}),
    ],
    ids=["selective", "selective-split", "all-parts", "block", "two-layers-at-once"],
)
def test_what_is_computed_again_changes_no_gradient(
    llama: Path,
    step: dict[str, Any],
    tmp_path: Path,
    layout: tuple[int, int, int, bool],
    model: dict[str, Any],
) -> None:
    check_step(step, llama, tmp_path / "gradients", layout, **model)
