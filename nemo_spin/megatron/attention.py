"""Core attention over packed rows, on PyTorch's fused kernel.

Legend: T positions of a packed row, S positions of a padded sequence, B sequences,
N heads of this rank, G query groups of this rank, D head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional


class SegmentAttention(MegatronModule):
    """Causal attention with grouped queries, over padded sequences or over segments of a packed row.

    Megatron hands the mask of a forward pass through to this module. For a packed row the
    mask is its segments (`data.packing.Microbatch.segments`): a run of queries sees a run
    of earlier keys, its prompt, and itself causally, which is a causal mask aligned at
    the bottom right. Without segments, sequences start at position 0 and are padded at
    the end, so that a causal mask alone keeps every real token from seeing padding.

    Args:
        config: Megatron's TransformerConfig.
        softmax_scale: Multiplies the scores; 1/sqrt(D) where None.
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
        """Attends.

        Args:
            query: [S, B, N, D], or [T, 1, N, D] of a packed row.
            key, value: The same with G for N.
            attention_mask: [segments, 4] int32 on the CPU, or None for padded sequences.

        Returns:
            [S, B, N * D], dtype of `query`.
        """
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if attention_mask is None:
            context = self._attend(query, key, value, is_causal=True)
        else:
            context = torch.cat(
                [self._segment(query, key, value, segment) for segment in attention_mask.tolist()], dim=2
            )
        return context.permute(2, 0, 1, 3).flatten(2).contiguous()

    def _segment(self, query: Tensor, key: Tensor, value: Tensor, segment: list[int]) -> Tensor:
        """One run of queries of [1, N, T, D]; segments follow each other without a gap."""
        first, count, prefix, prefix_count = segment
        query = query.narrow(2, first, count)
        own_key, own_value = key.narrow(2, first, count), value.narrow(2, first, count)
        if not prefix_count:
            return self._attend(query, own_key, own_value, is_causal=True)
        seen = torch.ones(count, prefix_count + count, dtype=torch.bool, device=query.device)
        return self._attend(
            query,
            torch.cat([key.narrow(2, prefix, prefix_count), own_key], dim=2),
            torch.cat([value.narrow(2, prefix, prefix_count), own_value], dim=2),
            attn_mask=seen.tril_(prefix_count),
        )

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **mask: Any) -> Tensor:
        return functional.scaled_dot_product_attention(
            query, key, value, scale=self.softmax_scale, enable_gqa=query.shape[1] != key.shape[1], **mask
        )
