"""bfloat16 training: float32 main weights and gradients, and a loss that is float32's up to rounding."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from tests.distributed import reference
from tests.distributed.harness import run_ranks

BETA = 0.1


def _step(model_dir: Path, table: pa.Table, dtype: torch.dtype, tensor: int) -> dict[str, Any]:
    """Loss and gradients of one batch, and the types that an optimizer step works in."""
    import numpy as np

    from nemo_spin.bridge.families import architecture_of
    from nemo_spin.bridge.import_hf import load_weights
    from nemo_spin.config.schema import ModelConfig
    from nemo_spin.data.datasets import Units
    from nemo_spin.megatron.engine import Engine, layout_of
    from nemo_spin.megatron.forward_step import SPIN_SUMS, spin_loss
    from nemo_spin.megatron.optimizers import build_optimizer, wrap_for_training
    from nemo_spin.megatron.provider import build_model
    from nemo_spin.megatron.runtime import initialize
    from nemo_spin.objective.objective import build_objective

    runtime = initialize(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=1, seed=1)
    config = ModelConfig(path=str(model_dir), tensor_model_parallel_size=tensor, sequence_parallel=tensor > 1)
    architecture = architecture_of(model_dir)
    chunks = build_model(architecture, config, params_dtype=dtype)
    load_weights(chunks, model_dir, architecture)
    wrapped = wrap_for_training(chunks, distributed_optimizer=False)
    optimizer = build_optimizer(wrapped, config.optim, lr=1e-3, params_dtype=dtype, distributed=False)
    engine = Engine(wrapped, runtime, architecture.vocab_size, layout_of(config), optimizer)
    units = Units(table)
    loss = partial(spin_loss, objective=build_objective(loss="logistic", beta=BETA))
    sums = engine.backward(units, np.arange(units.num_units), loss=loss, names=SPIN_SUMS)
    parameters = list(wrapped[0].parameters())
    gradients = torch.cat([parameter.main_grad.flatten() for parameter in parameters])
    norm = engine.update(1e-3)
    return {
        "loss": sums["loss"] / sums["units"],
        "real": sums["policy_real_logps"] / sums["units"],
        "gradients": gradients.clone(),
        "norm": norm,
        "parameters": {parameter.dtype for parameter in parameters},
        "updated": {weight.dtype for group in optimizer.param_groups for weight in group["params"]},
    }


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
