"""Sending while computing: the same weights after several steps as without."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from tests.distributed import reference
from tests.distributed.harness import run_ranks
from tests.distributed.megatron.test_engine import NUM_ROWS, _engine, ranks

OVERLAPS = {"overlap_grad_reduce": True}
GATHERS = {**OVERLAPS, "overlap_param_gather": True, "use_distributed_optimizer": True}


def _trained(
    model_dir: Path, table: pa.Table, layout: tuple[int, int, int, bool], model: dict[str, Any]
) -> tuple[list[torch.Tensor], dict[int, tuple[float, float]]]:
    """Weights of rank 0 after two updates, and what scoring right after an update sees."""
    import numpy as np

    from nemo_spin.config.schema import OptimConfig
    from nemo_spin.data.datasets import Units
    from nemo_spin.megatron.forward_step import SPIN_SUMS, spin_loss
    from nemo_spin.objective.objective import build_objective

    engine, _ = _engine(model_dir, layout, optim=OptimConfig(name="adam"), **model)
    units = Units(table)
    loss = partial(spin_loss, objective=build_objective(loss="logistic", beta=0.7))
    for _ in range(2):
        engine.backward(units, np.arange(units.num_units), loss=loss, names=SPIN_SUMS)
        engine.update(1e-2)
    engine.settle()
    engine.settle()  # nothing is left to complete
    weights = [parameter.detach().clone() for chunk in engine.chunks for parameter in chunk.parameters()]
    engine.backward(units, np.arange(units.num_units), loss=loss, names=SPIN_SUMS)
    engine.update(1e-2)
    return weights, engine.score(units, np.arange(units.num_units))


@pytest.mark.parametrize(
    ("layout", "model", "overlap"),
    [
        ((1, 1, 2, False), {}, OVERLAPS),
        ((1, 1, 2, False), {}, GATHERS),
        ((1, 1, 1, False), {"context_parallel_size": 2}, GATHERS),
        ((1, 2, 2, False), {"virtual_pipeline_model_parallel_size": 2}, GATHERS),
    ],
    ids=["gradients", "weights", "context", "interleaved"],
)
def test_overlap_changes_no_weight(
    tmp_path: Path, layout: tuple[int, int, int, bool], model: dict[str, Any], overlap: dict[str, Any]
) -> None:
    model_dir = reference.make_model(tmp_path / "model", num_hidden_layers=4)
    table = reference.make_pairs(NUM_ROWS)
    table = reference.with_opponent(table, torch.full((NUM_ROWS, 2), -20.0, dtype=torch.float64))
    plain = {key: overlap[key] for key in overlap if key == "use_distributed_optimizer"}
    size = ranks(layout, model)
    weights, scores = run_ranks(_trained, size, model_dir, table, layout, {**model, **overlap})
    expected, expected_scores = run_ranks(_trained, size, model_dir, table, layout, {**model, **plain})
    for found, wanted in zip(weights, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    assert scores == {row: pytest.approx(values, rel=1e-5) for row, values in expected_scores.items()}
    assert len(scores) == NUM_ROWS
