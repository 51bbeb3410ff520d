"""Core attention over packed rows, on PyTorch's fused kernels.

Legend: T positions of a packed row, S positions of a padded sequence, B sequences, CP
context-parallel size, N heads of this rank, G query groups of this rank, D head size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn import functional

from nemo_spin.data.context import chunks_by_rank
from nemo_spin.megatron.attention_kernels import kernel_for, row_attention


class SegmentAttention(MegatronModule):
    """Causal attention with grouped queries, over padded sequences or over segments of a packed row.

    Megatron hands the mask of a forward pass through to this module. For a packed row the
    mask is its segments (`data.packing.Microbatch.segments`): a run of queries sees a run
    of earlier keys, its prompt, and its own run causally, which is a causal mask aligned
    at the bottom right. Without segments, sequences start at position 0 and are padded at
    the end, so that a causal mask alone keeps every real token from seeing padding.

    A GPU's variable-length kernel takes all segments at once (`attention_kernels`); elsewhere
    they are taken one by one.

    Under context parallelism a rank's queries are those of its chunks of the row
    (`data.context`), its segments say so, and keys and values of all ranks are gathered.

    A layer's window (`window_size` and `window_attn_skip_freq` of Megatron's configuration)
    hides from a query what lies further back; a response counts from its prompt.

    Args:
        config: Megatron's TransformerConfig.
        layer_number: From 1, in the whole model.
        softmax_scale: Multiplies the scores; 1/sqrt(D) where None.
        pg_collection: Megatron's process groups; their `cp` is used.
        logit_cap: Scores s become cap * tanh(s / cap), which needs all of them in memory.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        logit_cap: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.cp_group: Any = pg_collection.cp if config.context_parallel_size > 1 else None
        has_window = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if has_window else None
        self.logit_cap = logit_cap
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Attends. Under context parallelism all ranks of the group must call.

        Args:
            query: [S/CP, B, N, D], or [T/CP, 1, N, D] of a packed row.
            key, value: The same with G for N.
            attention_mask: [segments, 6] int32 on the CPU, or None for whole padded sequences.

        Returns:
            [S/CP, B, N * D], dtype of `query`.
        """
        if self.cp_group is not None:
            key, value = self._of_all_ranks(key, value)
        kernel = kernel_for(query, window=self.window) if self.logit_cap is None else None
        if attention_mask is not None and query.shape[1] == 1 and kernel is not None:
            row = row_attention(
                *(tensor.squeeze(1) for tensor in (query, key, value)),
                segments=attention_mask,
                softmax_scale=self.softmax_scale,
                kernel=kernel,
            )
            return row.flatten(1).unsqueeze(1)
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if attention_mask is None:
            context = self._attend(query, key, value)
        else:
            context = self._attend_to_segments(query, key, value, attention_mask.tolist())
        return context.permute(2, 0, 1, 3).flatten(2).contiguous()

    def _of_all_ranks(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of whole rows, in the order of the row; their gradients are summed over ranks."""
        shares = gather_from_sequence_parallel_region(
            torch.cat([key, value], dim=-1), tensor_parallel_output_grad=True, group=self.cp_group
        )
        owners = [chunk for chunks in chunks_by_rank(self.cp_group.size()) for chunk in chunks]
        parts = shares.chunk(len(owners))
        rows = torch.cat([parts[owners.index(chunk)] for chunk in range(len(owners))])
        keys, values = rows.split([key.shape[-1], value.shape[-1]], dim=-1)
        return keys, values

    def _attend_to_segments(
        self, query: Tensor, key: Tensor, value: Tensor, segments: list[list[int]]
    ) -> Tensor:
        """One run of queries of [B, N, T, D] after the other; they follow each other without a gap.

        Rows are split once, at all the segments' bounds: the gradient of a split is one concatenation,
        that of a slice for each segment a row of zeros with the segment's values in it.
        """
        ranges = [bounds for segment in segments for bounds in (segment[2:4], segment[4:6])]
        bounds = sorted({0, key.shape[2]}.union(*((start, start + count) for start, count in ranges)))
        pieces = {bound: number for number, bound in enumerate(bounds)}
        sizes = [stop - start for start, stop in itertools.pairwise(bounds)]
        keys, values = key.split(sizes, dim=2), value.split(sizes, dim=2)
        queries = query.split([segment[1] for segment in segments], dim=2)
        contexts = []
        for own, (_, _, prefix, prefix_count, run, run_count) in zip(queries, segments, strict=True):
            seen = list(range(pieces[run], pieces[run + run_count]))
            if prefix_count:
                seen = [*range(pieces[prefix], pieces[prefix + prefix_count]), *seen]
            elif len(seen) > 1:  # a slice is kept for the backward pass as it lies, joined pieces as a copy
                whole = (tensor.narrow(2, run, run_count) for tensor in (key, value))
                contexts.append(self._attend(own, *whole))
                continue
            contexts.append(self._attend(own, _joined(keys, seen), _joined(values, seen)))
        return torch.cat(contexts, dim=2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal, aligned at the bottom right: the last query sees every key that its window reaches."""
        mask = self._mask(query.shape[2], key.shape[2], query.device)
        if self.logit_cap is not None:
            return self._attend_capped(query, key, value, mask, self.logit_cap)
        if query.is_cuda and (mask is not None or query.dtype == torch.float32):
            # No fused GPU kernel has grouped heads beside a mask or float32; scores would be kept
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def _mask(self, count: int, keys: int, device: torch.device) -> Tensor | None:
        """Keys that each query sees: [count, keys]. None: as many as queries, those up to its own."""
        window = self.window if self.window is not None and self.window < keys else None
        if count == keys and window is None:
            return None
        seen = torch.ones(count, keys, dtype=torch.bool, device=device).tril_(keys - count)
        return seen if window is None else seen.triu_(keys - count - window + 1)

    def _attend_capped(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cap: float
    ) -> Tensor:
        """The same with capped scores (Gemma 2, arXiv 2408.00118); no fused kernel knows the cap."""
        copies = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(copies, dim=1), value.repeat_interleave(copies, dim=1)
        scores = (query @ key.transpose(2, 3)).float() * (self.softmax_scale / cap)
        if mask is None:
            mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril_()
        scores = (scores.tanh() * cap).masked_fill(~mask, float("-inf"))
        return scores.softmax(dim=-1).to(value.dtype) @ value


def _joined(pieces: Sequence[Tensor], chosen: list[int]) -> Tensor:
    """The chosen pieces of [B, G, T, D], one after the other."""
    if len(chosen) == 1:
        return pieces[chosen[0]]
    return torch.cat([pieces[number] for number in chosen], dim=2)
