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


def _trajectory(model_dir: Path, name: str, weight_decay: float, sharded: bool) -> tuple[float, float]:
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
    wrapped = wrap_for_training(chunks, distributed_optimizer=sharded)
    optimizer = build_optimizer(
        wrapped, config.optim, lr=1e-3, params_dtype=torch.float32, distributed=sharded
    )
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
    return torch.optim.RMSprop(
        plain.values(), alpha=optim.alpha, eps=optim.eps, weight_decay=optim.weight_decay
    )


@pytest.mark.parametrize("ranks", [1, 2])  # two share the state out between them
@pytest.mark.parametrize(
    ("name", "weight_decay"), [("rmsprop", 0.0), ("rmsprop", 0.1), ("adam", 0.0), ("adam", 0.1)]
)
def test_trajectory_is_that_of_torch(tmp_path: Path, name: str, weight_decay: float, ranks: int) -> None:
    model_dir = reference.make_model(tmp_path / "model")
    worst, moved = run_ranks(_trajectory, ranks, model_dir, name, weight_decay, ranks > 1)
    assert worst < 1e-6
    assert moved > 1e-3, "the weights must have gone somewhere for the comparison to mean anything"


def _operations_of_a_step(model_dir: Path, name: str) -> list[str]:
    """What PyTorch computes in an optimizer step, told that weights lie where it prefers all at once.

    A stand-in for GPUs in that answer alone, which is where they differ.
    """
    from unittest import mock

    from torch.utils._python_dispatch import TorchDispatchMode

    from nemo_spin.megatron.optimizers import build_optimizer, wrap_for_training

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operations.append(str(func))
            return func(*args, **(kwargs or {}))

    operations: list[str] = []
    chunks, optim = _bfloat16_model(model_dir)
    optim.name = name
    wrapped = wrap_for_training(chunks, distributed_optimizer=False)
    optimizer = build_optimizer(wrapped, optim, lr=1e-3, params_dtype=torch.bfloat16, distributed=False)
    for parameter in wrapped[0].parameters():
        parameter.main_grad.fill_(1.0)
    all_at_once = mock.patch(f"torch.optim.{name}._default_to_fused_or_foreach", return_value=(False, True))
    with all_at_once, Recorder():
        optimizer.step()
    return operations


@pytest.mark.parametrize("name", ["rmsprop", "adam"])
def test_no_term_of_an_update_is_held_for_all_weights_at_once(tmp_path: Path, name: str) -> None:
    """A copy of the whole state would not fit where the state itself is most of a GPU."""
    operations = run_ranks(_operations_of_a_step, 1, reference.make_model(tmp_path / "model"), name)
    assert any(operation.startswith(("aten.sqrt", "aten._fused_adam")) for operation in operations)
    assert not [operation for operation in operations if operation.startswith("aten._foreach_sqrt")]


def _offloading(model_dir: Path) -> tuple[str, float, str]:
    """What is built; Megatron asks for Transformer Engine's version, so a stand-in answers."""
    from unittest import mock

    from nemo_spin.megatron.optimizer_state import optimizer_parts
    from nemo_spin.megatron.optimizers import build_optimizer, wrap_for_training

    chunks, optim = _bfloat16_model(model_dir)
    wrapped = wrap_for_training(chunks, distributed_optimizer=True)
    with mock.patch("megatron.core.optimizer.optimizer_config.is_te_min_version", return_value=False):
        optimizer = build_optimizer(
            wrapped, optim, lr=1e-3, params_dtype=torch.bfloat16, distributed=True, offload_fraction=0.5
        )
    inner = optimizer_parts(optimizer)[0].optimizer
    return type(inner).__name__, inner.offload_fraction, inner.cpu_optimizer_cls.__name__


def _bfloat16_model(model_dir: Path) -> tuple[list[Any], Any]:
    from nemo_spin.bridge.families import architecture_of
    from nemo_spin.bridge.import_hf import load_weights
    from nemo_spin.config.schema import ModelConfig
    from nemo_spin.megatron.provider import build_model
    from nemo_spin.megatron.runtime import initialize

    initialize(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, seed=1)
    config = ModelConfig(path=str(model_dir))
    config.optim.name, config.optim.weight_decay, config.optim.clip_grad = "adam", 0.1, 0.0
    architecture = architecture_of(model_dir)
    chunks = build_model(architecture, config, params_dtype=torch.bfloat16)
    load_weights(chunks, model_dir, architecture)
    return chunks, config.optim


def test_offloading_is_megatrons(tmp_path: Path) -> None:
    """Megatron's optimizer steps on GPUs only: here it is built and asked what it would do."""
    model_dir = reference.make_model(tmp_path / "model")
    assert run_ranks(_offloading, 2, model_dir) == ("HybridDeviceOptimizer", 0.5, "AdamW")


def _tiny_steps(model_dir: Path, name: str, sharded: bool) -> tuple[float, bool]:
    """How far bfloat16 weights and their float32 main weights move in 200 steps of 1e-7."""
    from nemo_spin.megatron.optimizer_state import optimizer_parts
    from nemo_spin.megatron.optimizers import build_optimizer, wrap_for_training

    chunks, optim = _bfloat16_model(model_dir)
    optim.name, optim.weight_decay = name, 0.0
    wrapped = wrap_for_training(chunks, distributed_optimizer=sharded)
    optimizer = build_optimizer(wrapped, optim, lr=1e-7, params_dtype=torch.bfloat16, distributed=sharded)
    held = optimizer_parts(optimizer)[0]
    mains = held.shard_fp32_from_float16_groups if sharded else held.fp32_from_float16_groups
    main = torch.cat([tensor.view(-1) for group in mains for tensor in group])
    weight = wrapped[0].module.decoder.layers[0].mlp.linear_fc2.weight
    start, main_start = weight.detach().clone(), main.clone()
    for _ in range(200):
        for parameter in wrapped[0].parameters():
            parameter.main_grad.fill_(1.0)
        optimizer.step()
    main = torch.cat([tensor.view(-1) for group in mains for tensor in group])
    return (main - main_start).abs().min().item(), bool((weight != start).any())


@pytest.mark.parametrize(("name", "ranks"), [("rmsprop", 1), ("rmsprop", 2), ("adam", 2)])
def test_learning_rates_of_1e_7_move_bfloat16_weights(tmp_path: Path, name: str, ranks: int) -> None:
    """A step of 1e-7 is below bfloat16's resolution; it is kept in the float32 main weights."""
    moved, visible = run_ranks(_tiny_steps, ranks, reference.make_model(tmp_path / "model"), name, ranks > 1)
    # With a constant gradient of 1 a step of Adam moves by lr, and step i of RMSProp by
    # lr / sqrt(1 - 0.99^i), so 200 by more than 200 lr. A float32 between 1/4 and 1/2 moves by
    # whole 2^-25: for 1e-7 by three of them, and that is where the least is lost and gained.
    assert moved > 200 * 1e-7 if name == "rmsprop" else moved >= 0.999 * 200 * 3 * 2**-25
    assert visible, "the steps add up to more than bfloat16's resolution for the smallest weights"


def _what_outlives_a_training(model_dir: Path, sharded: bool) -> list[str]:
    """Trains a step, lets go of everything, leaves the process groups; what is there still."""
    import gc
    import weakref

    from nemo_spin.megatron.runtime import finalize
    from tests.distributed.megatron.lora_ranks import spin
    from tests.distributed.megatron.test_engine import _engine

    engine, _ = _engine(model_dir, (1, 1, 1, False), use_distributed_optimizer=sharded)
    table = reference.with_opponent(reference.make_pairs(4), torch.full((4, 2), -20.0))
    spin(engine, table)
    engine.update(1e-3)
    parts = {"model": engine.chunks[0], "optimizer": engine.optimizer, "buffer": engine.chunks[0].buffers[0]}
    held = {name: weakref.ref(part) for name, part in parts.items()}
    del engine, parts
    finalize()
    gc.collect()
    return [name for name, part in held.items() if part() is not None]


@pytest.mark.parametrize("sharded", [False, True])
def test_nothing_of_a_training_outlives_it(tmp_path: Path, sharded: bool) -> None:
    model_dir = reference.make_model(tmp_path / "model")
    assert run_ranks(_what_outlives_a_training, 1, model_dir, sharded) == []
