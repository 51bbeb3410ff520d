"""Mixtures of experts in training: checkpoints go on wherever the experts lie then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_spin.config.schema import OptimConfig
from tests.distributed import reference
from tests.distributed.harness import run_ranks
from tests.distributed.megatron.test_checkpoint import Layout, _go_on, _save_half_way
from tests.unit.bridge.checkpoints import COMMON, make_checkpoint

SHARED = {"use_distributed_optimizer": True}
LOADED: list[tuple[Layout, dict[str, Any]]] = [
    ((1, 1, 1, False), {}),
    ((1, 1, 2, False), {**SHARED, "expert_model_parallel_size": 2}),
    ((2, 1, 1, True), {"expert_model_parallel_size": 2}),
    ((2, 1, 1, True), SHARED),
    ((1, 2, 1, False), {}),
]


@pytest.mark.parametrize("optim", ["adam", pytest.param("rmsprop", marks=pytest.mark.slow)])
def test_a_checkpoint_continues_where_experts_lie_on_other_ranks(tmp_path: Path, optim: str) -> None:
    model_dir = make_checkpoint(tmp_path / "model", "qwen2_moe", std=0.1)
    table = reference.make_pairs(9, vocab_size=COMMON["vocab_size"])
    table = reference.with_opponent(table, torch.full((9, 2), -25.0))
    chosen, layout = {"optim": OptimConfig(name=optim)}, (1, 1, 2, False)
    saved = {**chosen, **SHARED, "expert_model_parallel_size": 2}
    uninterrupted = run_ranks(_save_half_way, 2, model_dir, tmp_path / "saved", table, layout, saved)
    assert len(set(uninterrupted)) == 8
    for other, others in LOADED:
        ranks = other[0] * other[1] * other[2]
        settings = {**chosen, **others}
        losses = run_ranks(_go_on, ranks, model_dir, tmp_path / "saved", table, other, settings)
        assert losses == pytest.approx(uninterrupted[4:], rel=1e-5), (other, others)
