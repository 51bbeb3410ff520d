"""What a resume checkpoint holds of a model: all of it, or its adapters alone where it has some.

The base of adapters never changes in training; whoever resumes loads it from the opponent. Only tensors
are held: scales of earlier steps (FP8's recipe `delayed`) start anew, and Transformer Engine would refuse
to unpickle them.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from torch import nn

from nemo_spin.megatron.lora import all_adapters, is_adapter
from nemo_spin.megatron.sharded_weights import only_tensors, take_tensors


def _named(module: nn.Module) -> dict[str, Any]:
    """Adapters' parameters by names that are the same however the model is split."""
    return {
        f"adapters.layers.{adapters.layer}.{name}.{letter}": parameter
        for adapters in all_adapters([module])
        for name, adapter in adapters.items()
        for letter, parameter in (("a", adapter.a), ("b", adapter.b))
    }


def model_state(module: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    """The sharded state of a model chunk, unwrapped. All ranks must call."""
    if not is_frozen(module):
        return only_tensors(module.sharded_state_dict(metadata=metadata))
    return {
        name: make_tp_sharded_tensor_for_checkpoint(parameter, name, tp_axis=parameter.partition_dim)
        if getattr(parameter, "tensor_model_parallel", False)
        else make_sharded_tensor_for_checkpoint(parameter, name)
        for name, parameter in _named(module).items()
    }


@torch.no_grad()
def load_model_state(module: Any, loaded: dict[str, Any]) -> None:
    """Takes what `model_state` described and a checkpoint held."""
    if not is_frozen(module):
        take_tensors(module, loaded)
        return
    for name, parameter in _named(module).items():
        parameter.copy_(loaded[name])


def is_frozen(module: nn.Module) -> bool:
    """Whether the base of a model is frozen: so it is in a chunk too that has no layer, and no adapter."""
    return not any(
        parameter.requires_grad for name, parameter in module.named_parameters() if not is_adapter(name)
    )
