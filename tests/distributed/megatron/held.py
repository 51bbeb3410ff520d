"""What a real training step holds and multiplies, counted tensor by tensor; runs in every rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch


@dataclass
class Held:
    """Bytes of distinct storages kept for backward passes, now and at most.

    Attributes:
        ignored: Addresses of storages that are there anyway: parameters and gradients.
    """

    ignored: set[int] = field(default_factory=set)
    live: int = 0
    peak: int = 0
    _uses: Counter[int] = field(default_factory=Counter)

    @contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Saved(tensor, self), _Saved.unpack):
            yield

    def add(self, address: int, size: int, change: int) -> None:
        if address in self.ignored:
            return
        before = self._uses[address]
        self._uses[address] += change
        if not before or not self._uses[address]:
            self.live += change * size
            self.peak = max(self.peak, self.live)


class _Saved:
    """A tensor that autograd keeps; counted for as long."""

    def __init__(self, tensor: torch.Tensor, held: Held) -> None:
        self._tensor, self._held = tensor, held
        storage = tensor.untyped_storage()
        self._key = (storage.data_ptr(), storage.nbytes())
        held.add(*self._key, 1)

    def unpack(self) -> torch.Tensor:
        return self._tensor

    def __del__(self) -> None:
        self._held.add(*self._key, -1)


def measure(
    model_dir: Path, table: pa.Table, model: dict[str, Any], optim: dict[str, Any], half: bool = False
) -> list[dict[str, Any]]:
    """One training step; what each rank held, by rank."""
    from torch import distributed

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

    config = ModelConfig(path=str(model_dir), **model)
    for name, value in optim.items():
        setattr(config.optim, name, value)
    runtime = initialize(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
        seed=1,
    )
    dtype = torch.bfloat16 if half else torch.float32
    architecture = architecture_of(model_dir)
    chunks = build_model(architecture, config, params_dtype=dtype)
    load_weights(chunks, model_dir, architecture)
    sharded = bool(config.use_distributed_optimizer)
    wrapped = wrap_for_training(chunks, distributed_optimizer=sharded)
    optimizer = build_optimizer(wrapped, config.optim, lr=1e-3, params_dtype=dtype, distributed=sharded)
    engine = Engine(wrapped, runtime, architecture.vocab_size, layout_of(config), optimizer)
    units = Units(table)
    parameters = list(wrapped[0].parameters())
    held = Held({parameter.untyped_storage().data_ptr() for parameter in parameters})
    loss = partial(spin_loss, objective=build_objective(loss="logistic", beta=0.1))
    everything = np.arange(units.num_units)
    with held.counting():
        engine.backward(units, everything, loss=loss, names=SPIN_SUMS)
    flops = _flops(engine, units, everything, loss)
    engine.update(1e-3)
    mine = {
        "parameters": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        "gradients": sum(
            buffer.grad_data.numel() * buffer.grad_data.element_size() for buffer in wrapped[0].buffers
        ),
        **_optimizer_bytes(optimizer),
        "activations": held.peak,
        "left": held.live,
        "flops": flops,
    }
    gathered: list[Any] = [None] * runtime.world_size
    distributed.all_gather_object(gathered, mine)
    return gathered


def _flops(engine: Any, units: Any, indices: Any, loss: Any) -> dict[str, int]:
    """By operator, of the forward and backward passes of one more step."""
    from torch.utils.flop_counter import FlopCounterMode

    from nemo_spin.megatron.forward_step import SPIN_SUMS

    counter = FlopCounterMode(display=False)
    with counter:
        engine.backward(units, indices, loss=loss, names=SPIN_SUMS)
    return {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}


def _optimizer_bytes(optimizer: Any) -> dict[str, int]:
    """Float32 main weights, and the state of all weights without step counters."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    groups = ("fp32_from_float16_groups", "shard_fp32_from_float16_groups")
    main = [
        tensor
        for part in parts
        for name in groups
        for group in getattr(part, name, [])
        for tensor in group
        if tensor is not None
    ]
    state = [
        tensor
        for part in parts
        for values in part.optimizer.state.values()
        for tensor in values.values()
        if isinstance(tensor, torch.Tensor) and tensor.dim()
    ]
    return {
        "main_weights": sum(tensor.numel() * tensor.element_size() for tensor in main),
        "optimizer_state": sum(tensor.numel() * tensor.element_size() for tensor in state),
    }
