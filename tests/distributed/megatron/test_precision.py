"""bfloat16 training: float32 main weights and gradients, and a loss that is float32's up to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from tests.distributed import reference
from tests.distributed.engines import make_engine, one_step
from tests.distributed.harness import run_ranks


def _step(model_dir: Path, table: pa.Table, dtype: torch.dtype, tensor: int) -> dict[str, Any]:
    engine = make_engine(
        model_dir, dtype=dtype, tensor_model_parallel_size=tensor, sequence_parallel=tensor > 1
    )
    return one_step(engine, table, beta=0.1)


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_bfloat16_step_is_a_float32_step_up_to_rounding(tmp_path: Path, tensor: int) -> None:
    model_dir = reference.make_model(tmp_path / "model")
    table = reference.with_opponent(reference.make_pairs(6), torch.full((6, 2), -20.0, dtype=torch.float64))
    full = run_ranks(_step, tensor, model_dir, table, torch.float32, tensor)
    half = run_ranks(_step, tensor, model_dir, table, torch.bfloat16, tensor)
    assert full["parameters"] == {torch.float32}
    assert half["parameters"] == {torch.bfloat16}
    assert half["updated"] == {torch.float32}, "the optimizer moves main weights, not bfloat16 ones"
    assert half["gradients"].dtype == torch.float32
    # bfloat16 keeps 8 bits: relative steps of 2^-8 = 0.4%, which partly cancel in sums
    assert half["loss"] == pytest.approx(full["loss"], rel=0.02)
    assert half["real"] == pytest.approx(full["real"], rel=0.005)
    assert half["norm"] == pytest.approx(full["norm"], rel=0.03)
    assert half["loss"] != full["loss"]
    # some 20 roundings lie between an early weight and the loss, and large random weights amplify them
    difference = (half["gradients"] - full["gradients"]).norm() / full["gradients"].norm()
    assert 0 < difference < 20 * 2**-8
