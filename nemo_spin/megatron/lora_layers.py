"""The adapters of one linear: what they compute, and what they add to its weight; see `lora.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from nemo_spin.config.schema import LoraConfig
from nemo_spin.megatron.runtime import Runtime

COLUMN_PARALLEL = ("self_attention.linear_qkv", "mlp.linear_fc1")


class Adapter(nn.Module):
    """A and B of one projection, as far as this rank holds them.

    Args:
        a: [r, in] (row-parallel: [r, in / TP]).
        b: [out / TP, r] (row-parallel: [out, r]).
    """

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(a)
        self.b = nn.Parameter(b)


class Adapters(nn.Module):
    """The adapters of one linear.

    Attributes:
        layer: Number of the layer in the whole model, from 0.
        linear: Its name in the layer, a key of `PROJECTIONS`.
        rank: r.
    """

    def __init__(
        self, adapters: dict[str, Adapter], *, place: tuple[int, str], lora: LoraConfig, runtime: Runtime
    ) -> None:
        super().__init__()
        assert lora.rank is not None, "without a rank there are no adapters"
        self.layer, self.linear = place
        self.rank = lora.rank
        self.scaling = lora.alpha / lora.rank
        self.dropout = lora.dropout
        self.runtime = runtime
        self.sequence_parallel = False  # set by `attach`
        self.of = nn.ModuleDict(adapters)
        self.hook: Any = None

    @property
    def is_column_parallel(self) -> bool:
        """Whether outputs (not inputs) are split over the tensor-parallel ranks."""
        return self.linear in COLUMN_PARALLEL

    def items(self) -> Iterator[tuple[str, Adapter]]:
        """Name of the projection and its adapter."""
        for name, adapter in self.of.items():
            assert isinstance(adapter, Adapter), "nothing else is put there"
            yield name, adapter

    def update(self) -> Tensor:
        """alpha / r B A for this rank's share of the linear's weight: [rows, columns], float32."""
        raise NotImplementedError

    def _dropped(self, inputs: Tensor) -> Tensor:
        """The input after dropout; see the top of `lora.py` for the random state."""
        if not self.training or self.dropout == 0.0:
            return inputs
        own_part = not self.is_column_parallel and self.runtime.tp_size > 1
        # under sequence parallelism Megatron runs the whole block in the tensor-parallel state already
        draws_alone = own_part and not self.sequence_parallel
        state = tensor_parallel.get_cuda_rng_tracker().fork() if draws_alone else contextlib.nullcontext()
        with state:
            return nn.functional.dropout(inputs, self.dropout)


class ColumnAdapters(Adapters):
    """Of a linear whose outputs are split.

    Attributes:
        widths: Outputs of each projection in a group of this rank's outputs, by name, in their order.
        groups: Such groups: query groups of attention, else one.
    """

    widths: dict[str, int]
    groups: int

    def forward(self, inputs: Tensor) -> Tensor:
        """[S, B, in] (sequence parallel: [S / TP, B, in]) -> [S, B, out / TP].

        All ranks of the tensor-parallel group must call.
        """
        group = self.runtime.tp_group
        low = nn.functional.linear(
            self._dropped(inputs), torch.cat([adapter.a for _, adapter in self.items()])
        )
        if self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=group)
        elif self.runtime.tp_size > 1:
            low = copy_to_tensor_model_parallel_region(low, group=group)
        parts = (low * self.scaling).split(self.rank, dim=-1)
        return self._fused(
            {
                name: nn.functional.linear(part, adapter.b)
                for part, (name, adapter) in zip(parts, self.items(), strict=True)
            }
        )

    def update(self) -> Tensor:
        """See `Adapters`."""
        columns = {
            name: (adapter.b.float() @ adapter.a.float()).t().mul_(self.scaling)
            for name, adapter in self.items()
        }
        return self._fused(columns).t()

    def _fused(self, outputs: dict[str, Tensor]) -> Tensor:
        """Projections' outputs [..., groups * width] as the fused linear orders them; 0 without adapter."""
        some = next(iter(outputs.values()))
        parts = []
        for name, width in self.widths.items():
            if name in outputs:
                parts.append(outputs[name].unflatten(-1, (self.groups, width)))
            else:
                parts.append(some.new_zeros(*some.shape[:-1], self.groups, width))
        return torch.cat(parts, dim=-1).flatten(-2)


class RowAdapters(Adapters):
    """Of a linear whose inputs are split; it is one projection."""

    @property
    def adapter(self) -> Adapter:
        """The only one."""
        ((_, adapter),) = self.items()
        return adapter

    def forward(self, inputs: Tensor) -> Tensor:
        """[S, B, in / TP] -> [S, B, out] (sequence parallel: [S / TP, B, out]).

        All ranks of the tensor-parallel group must call.
        """
        low = nn.functional.linear(self._dropped(inputs), self.adapter.a)
        if self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.runtime.tp_group)
        elif self.runtime.tp_size > 1:
            low = reduce_from_tensor_model_parallel_region(low, group=self.runtime.tp_group)
        return nn.functional.linear(low * self.scaling, self.adapter.b)

    def update(self) -> Tensor:
        """See `Adapters`."""
        return (self.adapter.b.float() @ self.adapter.a.float()).mul_(self.scaling)


def normalised_input(linear: Any, inputs: Tensor) -> Tensor:
    """What the linear's weight is multiplied with: Transformer Engine fuses the norm before it."""
    weight = getattr(linear, "layer_norm_weight", None)
    if weight is None:
        return inputs
    weight = weight + 1 if linear.zero_centered_gamma else weight
    if linear.normalization == "RMSNorm":
        return nn.functional.rms_norm(inputs, inputs.shape[-1:], weight, linear.eps)
    return nn.functional.layer_norm(inputs, inputs.shape[-1:], weight, linear.layer_norm_bias, linear.eps)
