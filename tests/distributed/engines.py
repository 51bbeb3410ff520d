"""Engines over random models, for the ranks of tests; every name is imported where it is used."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch


def make_engine(
    model_dir: Path,
    *,
    dtype: torch.dtype,
    distributed_optimizer: bool = False,
    lr: float = 1e-3,
    optim: dict[str, Any] | None = None,
    **model: Any,
) -> Any:
    """The policy of `model_dir`, wrapped for training, with its optimizer; no gradient is clipped.

    All ranks must call. `model` has entries of ModelConfig, `optim` of its optimizer.
    """
    from nemo_spin.bridge.families import architecture_of
    from nemo_spin.bridge.import_hf import load_weights
    from nemo_spin.config.schema import ModelConfig, OptimConfig
    from nemo_spin.megatron.engine import Engine, layout_of
    from nemo_spin.megatron.optimizers import build_optimizer, wrap_for_training
    from nemo_spin.megatron.provider import build_model
    from nemo_spin.megatron.runtime import initialize

    config = ModelConfig(
        path=str(model_dir), optim=OptimConfig(**{"clip_grad": 0.0, **(optim or {})}), **model
    )
    runtime = initialize(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        seed=1,
    )
    architecture = architecture_of(model_dir)
    chunks = build_model(architecture, config, params_dtype=dtype)
    load_weights(chunks, model_dir, architecture)
    wrapped = wrap_for_training(chunks, distributed_optimizer=distributed_optimizer)
    optimizer = build_optimizer(
        wrapped, config.optim, lr=lr, params_dtype=dtype, distributed=distributed_optimizer
    )
    return Engine(wrapped, runtime, architecture.vocab_size, layout_of(config), optimizer)


def one_step(engine: Any, table: Any, *, beta: float, lr: float = 1e-3) -> dict[str, Any]:
    """Loss and gradients of all units in one batch, and what an update moved. All ranks must call."""
    import numpy as np

    from nemo_spin.data.datasets import Units
    from nemo_spin.megatron.forward_step import SPIN_SUMS, spin_loss
    from nemo_spin.objective.objective import build_objective

    units = Units(table)
    loss = partial(spin_loss, objective=build_objective(loss="logistic", beta=beta))
    sums = engine.backward(units, np.arange(units.num_units), loss=loss, names=SPIN_SUMS)
    parameters = list(engine.chunks[0].parameters())
    gradients = torch.cat([parameter.main_grad.flatten() for parameter in parameters]).clone()
    norm = engine.update(lr)
    return {
        "loss": sums["loss"] / sums["units"],
        "real": sums["policy_real_logps"] / sums["units"],
        "gradients": gradients,
        "norm": norm,
        "parameters": {parameter.dtype for parameter in parameters},
        "updated": {weight.dtype for group in engine.optimizer.param_groups for weight in group["params"]},
    }
