"""The gate of a SwiGLU layer as one function with a backward pass of its own."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional


class SwiGLU(MegatronModule):
    """silu(gate) * up (arXiv 2002.05202, eq. 6), without biases.

    Keeps its input for the backward pass and nothing else, and forms silu(gate) again there.
    Megatron's own, without kernels that a compiler makes, keeps silu(gate) and a copy of `up` as
    well: 5 numbers for each column of the MLP where these are 3, the product included.

    Args:
        config: Megatron's TransformerConfig.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """[..., 2 F/TP], the gate's columns before the others, to [..., F/TP] of the same dtype."""
        result: Tensor = _SwiGLU.apply(gate_and_up)
        return result


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_and_up)
        grad_gate, grad_up = result.chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate, out=grad_up)
        grad_up.mul_(grads[0])
        torch.mul(grads[0], up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return result
