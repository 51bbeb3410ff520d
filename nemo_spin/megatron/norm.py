"""Norms for Megatron's local layer spec.

Megatron's own PyTorch norm refuses sequence parallelism. Under it the weight's gradient
is a partial sum over this rank's share of the sequence; Megatron sums the gradients of
all parameters marked `sequence_parallel` over the tensor-parallel group.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn


class RMSNorm(MegatronModule):
    """y = w * x / sqrt(mean(x^2) + eps), statistics in float32 (arXiv 1910.07467).

    Args:
        config: Megatron's TransformerConfig; its `sequence_parallel` marks the weight, under
            its `layernorm_zero_centered_gamma` 1 + w takes the place of w, in float32.
        hidden_size: Size of the last axis.
        eps: Added to the mean square.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(config=config)
        self.eps = eps
        self.weight = _parameter(hidden_size, config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalises the last axis; same shape and dtype as the input."""
        zero_centered = bool(self.config.layernorm_zero_centered_gamma)
        if hidden_states.is_cuda and not zero_centered:  # one kernel, which keeps no more than ours
            return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)
        result: Tensor = _RMSNorm.apply(hidden_states, self.weight, self.eps, zero_centered)
        return result


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number for each of its rows; the normalised x is formed again in the backward pass.

    With n = x / r, r = sqrt(mean(x^2) + eps), and u = w dL/dy: dL/dx = (u - n mean(u n)) / r.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> Tensor:
        values = x.float()
        inverse = torch.linalg.vector_norm(values, dim=-1, keepdim=True).square_()
        inverse.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.zero_centered = zero_centered
        normalised = values * inverse
        if zero_centered:
            return normalised.mul_(1.0 + weight.float()).to(x.dtype)
        return normalised.to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight, inverse = ctx.saved_tensors
        grad, normalised = grads[0].float(), x.float() * inverse
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normalised).flatten(0, -2).sum(0).to(weight.dtype)
        passed = grad * (1.0 + weight.float() if ctx.zero_centered else weight.float())
        mean = (passed * normalised).mean(-1, keepdim=True)
        grad_x = passed.addcmul_(normalised, mean, value=-1.0).mul_(inverse)
        return grad_x.to(x.dtype), grad_weight, None, None


class LayerNorm(MegatronModule):
    """y = w * (x - mean(x)) / sqrt(var(x) + eps) + b (arXiv 1607.06450).

    Args:
        config: Megatron's TransformerConfig; its `sequence_parallel` marks weight and bias.
        hidden_size: Size of the last axis.
        eps: Added to the variance.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(config=config)
        self.eps = eps
        self.weight = _parameter(hidden_size, config)
        self.bias = _parameter(hidden_size, config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalises the last axis; same shape and dtype as the input."""
        return nn.functional.layer_norm(hidden_states, self.weight.shape, self.weight, self.bias, self.eps)


def _parameter(size: int, config: Any) -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(size, dtype=config.params_dtype, device=torch.cuda.current_device()))
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter


class HeadsNorm(MegatronModule):
    """RMSNorm over all heads of the queries, or of the keys, together; ranks hold their heads' weights.

    All ranks of the tensor-parallel group must call its forward pass, and do in its backward
    pass: the mean square is over the heads of all ranks.

    Args:
        config: Megatron's TransformerConfig.
        num_heads: In all ranks.
        hidden_size: Channels of a head.
        eps: Added to the mean square.
    """

    def __init__(self, config: Any, num_heads: int, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(config=config)
        self.eps = eps
        self.size = num_heads * hidden_size
        self.weight = nn.Parameter(
            torch.ones(
                self.size // config.tensor_model_parallel_size,
                dtype=config.params_dtype,
                device=torch.cuda.current_device(),
            )
        )
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, heads: Tensor) -> Tensor:
        """Normalises [S, B, heads of this rank, channels]; same shape and dtype."""
        x = heads.float()
        group = parallel_state.get_tensor_model_parallel_group()
        squares = x.pow(2).sum(dim=(-2, -1), keepdim=True)
        # summed over ranks forward; backward too, as every rank's heads depend on the sum
        squares = copy_to_tensor_model_parallel_region(
            reduce_from_tensor_model_parallel_region(squares, group=group), group=group
        )
        x = x * torch.rsqrt(squares / self.size + self.eps)
        return (self.weight.view(heads.shape[-2:]) * x).to(heads.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        """The weight, split over tensor-parallel ranks, for Megatron's distributed checkpoints."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets
        )
