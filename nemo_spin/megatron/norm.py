"""RMSNorm for Megatron's local layer spec.

Megatron's own PyTorch norm refuses sequence parallelism. Under it the weight's gradient
is a partial sum over this rank's share of the sequence; Megatron sums the gradients of
all parameters marked `sequence_parallel` over the tensor-parallel group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """y = w * x / sqrt(mean(x^2) + eps), statistics in float32 (arXiv 1910.07467).

    Args:
        config: Megatron's TransformerConfig; its `sequence_parallel` marks the weight.
        hidden_size: Size of the last axis.
        eps: Added to the mean square.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        device = torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalises the last axis; same shape and dtype as the input."""
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(hidden_states.dtype)
