"""Attention over the segments of a packed row in one call of a variable-length kernel.

The kernel takes queries and keys as sequences of different lengths, one after the other,
and aligns its causal mask at the bottom right of each pair. A segment's keys are its
prefix and its own run, which lie apart in the row; they are selected into such sequences,
so that a prompt's keys and values stand there once for itself and once for each response,
while they are computed, kept and differentiated once.

Legend: T queries and S keys of a row, K selected keys, N heads of this rank, G query groups
of this rank, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_spin.megatron.compat import varlen_attention

_LARGEST_HEAD = 256  # channels; of FlashAttention's kernels
_HEAD_MULTIPLE = 8
_AMPERE = (8, 0)


@dataclass(frozen=True)
class VariableLengths:
    """A row's segments as a variable-length kernel takes them.

    Attributes:
        keys: [K] int64; position in the row of each selected key, segment after segment.
        cu_seqlens_q: [segments + 1] int32; where each segment's queries begin, and their number.
        cu_seqlens_kv: [segments + 1] int32; the same for the selected keys.
        max_seqlen_q, max_seqlen_kv: Most queries and keys of a segment.
    """

    keys: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_kv: Tensor
    max_seqlen_q: int
    max_seqlen_kv: int


# (query [T, N, D], key [K, G, D], value [K, G, D], lengths, softmax scale) -> [T, N, D]
Kernel = Callable[[Tensor, Tensor, Tensor, VariableLengths, float], Tensor]


def variable_lengths(segments: Tensor, device: torch.device) -> VariableLengths:
    """Lengths and key positions of `segments`; made once for all layers that ask for the same.

    Args:
        segments: [segments, 6] int32 on the CPU (`data.packing.Microbatch.segments`); their
            queries follow each other without a gap.
        device: Gets the result.
    """
    return _variable_lengths(segments.contiguous().numpy().tobytes(), device)


@functools.lru_cache(maxsize=64)  # more than there are microbatches between a forward and its recomputation
def _variable_lengths(content: bytes, device: torch.device) -> VariableLengths:
    segments = torch.frombuffer(bytearray(content), dtype=torch.int32).view(-1, 6).long()
    queries, prefix, prefix_keys, run, run_keys = segments[:, 1:].unbind(1)
    starts = torch.stack([prefix, run], dim=1).flatten()
    counts = torch.stack([prefix_keys, run_keys], dim=1).flatten()
    before = counts.cumsum(0) - counts
    keys = torch.repeat_interleave(starts - before, counts) + torch.arange(int(counts.sum()))
    key_counts = prefix_keys + run_keys
    return VariableLengths(
        keys=keys.to(device),
        cu_seqlens_q=_from_zero(queries).to(device),
        cu_seqlens_kv=_from_zero(key_counts).to(device),
        max_seqlen_q=int(queries.max()),
        max_seqlen_kv=int(key_counts.max()),
    )


def _from_zero(counts: Tensor) -> Tensor:
    """[n + 1] int32: 0 and the running sums."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()


def row_attention(
    query: Tensor, key: Tensor, value: Tensor, *, segments: Tensor, softmax_scale: float, kernel: Kernel
) -> Tensor:
    """Attends from every segment of a packed row to its prefix and, causally, to its own run.

    Args:
        query: [T, N, D].
        key, value: [S, G, D].
        segments: See `variable_lengths`.
        softmax_scale: Multiplies the scores.
        kernel: Attends within each of several sequences, causal mask aligned at the bottom right.

    Returns:
        [T, N, D], dtype of `query`.
    """
    lengths = variable_lengths(segments, query.device)
    key, value = (tensor.index_select(0, lengths.keys) for tensor in (key, value))
    return kernel(query, key, value, lengths, softmax_scale)


def kernel_for(query: Tensor, *, window: int | None = None) -> Kernel | None:
    """PyTorch's variable-length kernel where it can run on `query` [..., D]; None: one segment at a time.

    It is FlashAttention's: half precision on GPUs from Ampere on.

    Args:
        query: What it shall run on.
        window: Keys that a query sees, its own included; None: all up to its own.
    """
    head_size = query.shape[-1]
    fits = head_size <= _LARGEST_HEAD and head_size % _HEAD_MULTIPLE == 0
    if not (query.is_cuda and fits and query.dtype in (torch.bfloat16, torch.float16)):
        return None
    if torch.cuda.get_device_capability(query.device) < _AMPERE or varlen_attention() is None:
        return None
    return functools.partial(_flash, window=window)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: VariableLengths,
    softmax_scale: float,
    *,
    window: int | None,
) -> Tensor:
    attend = varlen_attention()
    assert attend is not None, "kernel_for() hands this out where it is there"
    context: Tensor = attend(
        query,
        key,
        value,
        lengths.cu_seqlens_q,
        lengths.cu_seqlens_kv,
        lengths.max_seqlen_q,
        lengths.max_seqlen_kv,
        scale=softmax_scale,
        **({} if window is None else {"window_size": (window - 1, 0)}),
    )
    return context
