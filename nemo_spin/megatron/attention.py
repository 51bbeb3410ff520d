"""Core attention for Megatron's local layer spec, on PyTorch's fused kernel."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.nn import functional

from megatron.core.transformer.module import MegatronModule


class CausalAttention(MegatronModule):
    """Causal scaled dot-product attention with grouped queries.

    Sequences of a microbatch start at position 0 and are padded at the end, so that a
    causal mask alone keeps every real token from seeing padding.

    Args:
        config: Megatron's TransformerConfig.
        softmax_scale: Multiplies the scores; 1/sqrt(head size) where None.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Attends causally.

        Args:
            query: [S, B, heads/TP, head size].
            key, value: [S, B, query groups/TP, head size].
            attention_mask: Unused; causality is all there is.

        Returns:
            [S, B, heads/TP * head size], dtype of `query`.
        """
        groups_differ = query.shape[2] != key.shape[2]
        context = functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=groups_differ,
        )
        return context.permute(2, 0, 1, 3).flatten(2).contiguous()
