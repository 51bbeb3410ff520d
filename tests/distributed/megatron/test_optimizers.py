"""Twenty optimizer steps through Megatron's wrappers, against `torch.optim` on a plain copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import reference
from tests.distributed.harness import run_ranks

STEPS = 20


def _gradient(name: str, weight: torch.Tensor, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + len(name))
    return torch.randn(weight.shape, generator=generator).to(weight.device)


def _trajectory(model_dir: Path, name: str, weight_decay: float) -> tuple[float, float]:
    """Largest relative difference of any weight, and how far weights moved."""
    from nemo_spin.bridge.families import architecture_of
    from nemo_spin.bridge.import_hf import load_weights
    from nemo_spin.config.schema import ModelConfig
    from nemo_spin.megatron.optimizers import build_optimizer, wrap_for_training
    from nemo_spin.megatron.provider import build_model
    from nemo_spin.megatron.runtime import initialize

    initialize(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, seed=1)
    config = ModelConfig(path=str(model_dir))
    config.optim.name, config.optim.weight_decay, config.optim.clip_grad = name, weight_decay, 0.0
    architecture = architecture_of(model_dir)
    chunks = build_model(architecture, config, params_dtype=torch.float32)
    load_weights(chunks, model_dir, architecture)
    wrapped = wrap_for_training(chunks, distributed_optimizer=False)
    optimizer = build_optimizer(wrapped, config.optim, lr=1e-3, params_dtype=torch.float32, distributed=False)
    named = dict(wrapped[0].named_parameters())
    start = {key: parameter.detach().clone() for key, parameter in named.items()}
    plain = {key: parameter.detach().clone().requires_grad_() for key, parameter in named.items()}
    other = _plain_optimizer(plain, config.optim)
    for step in range(STEPS):
        for group in (*optimizer.param_groups, *other.param_groups):
            group["lr"] = 1e-3 / (step + 1)
        for key, parameter in named.items():
            parameter.main_grad.copy_(_gradient(key, parameter, step))
            plain[key].grad = _gradient(key, parameter, step)
        optimizer.step()
        other.step()
    worst = max(((named[key] - plain[key]).norm() / plain[key].norm()).item() for key in named)
    moved = min(((named[key] - start[key]).norm() / start[key].norm()).item() for key in named)
    return worst, moved


def _plain_optimizer(plain: dict[str, torch.Tensor], optim: Any) -> torch.optim.Optimizer:
    if optim.name == "adam":
        return torch.optim.AdamW(
            plain.values(), betas=tuple(optim.betas), eps=optim.eps, weight_decay=optim.weight_decay
        )
    return torch.optim.RMSprop(plain.values(), alpha=optim.alpha, eps=optim.eps)


@pytest.mark.parametrize(("name", "weight_decay"), [("rmsprop", 0.0), ("adam", 0.0), ("adam", 0.1)])
def test_trajectory_is_that_of_torch(tmp_path: Path, name: str, weight_decay: float) -> None:
    model_dir = reference.make_model(tmp_path / "model")
    worst, moved = run_ranks(_trajectory, 1, model_dir, name, weight_decay)
    assert worst < 1e-6
    assert moved > 1e-3, "the weights must have gone somewhere for the comparison to mean anything"


def _tiny_steps(model_dir: Path) -> tuple[float, bool]:
    """How far bfloat16 weights and their float32 main weights move in 200 steps of 1e-7."""
    from nemo_spin.bridge.families import architecture_of
    from nemo_spin.bridge.import_hf import load_weights
    from nemo_spin.config.schema import ModelConfig
    from nemo_spin.megatron.optimizers import build_optimizer, wrap_for_training
    from nemo_spin.megatron.provider import build_model
    from nemo_spin.megatron.runtime import initialize

    initialize(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, seed=1)
    config = ModelConfig(path=str(model_dir))
    config.optim.clip_grad = 0.0
    architecture = architecture_of(model_dir)
    chunks = build_model(architecture, config, params_dtype=torch.bfloat16)
    load_weights(chunks, model_dir, architecture)
    wrapped = wrap_for_training(chunks, distributed_optimizer=False)
    optimizer = build_optimizer(
        wrapped, config.optim, lr=1e-7, params_dtype=torch.bfloat16, distributed=False
    )
    weight = wrapped[0].module.decoder.layers[0].mlp.linear_fc2.weight
    start, main_start = weight.detach().clone(), weight.main_param.detach().clone()
    for _ in range(200):
        for parameter in wrapped[0].parameters():
            parameter.main_grad.fill_(1.0)
        optimizer.step()
    moved = (weight.main_param - main_start).abs().min().item()
    return moved, bool((weight != start).any())


def test_learning_rates_of_1e_7_move_bfloat16_weights(tmp_path: Path) -> None:
    """A step of 1e-7 is below bfloat16's resolution; it is kept in the float32 main weights."""
    moved, visible = run_ranks(_tiny_steps, 1, reference.make_model(tmp_path / "model"))
    # RMSProp with a constant gradient of 1: step i moves by lr / sqrt(1 - 0.99^i), so 200 by more than 200 lr
    assert moved > 200 * 1e-7
    assert visible, "the steps add up to more than bfloat16's resolution for the smallest weights"
