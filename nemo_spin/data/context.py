"""Context parallelism: which positions of a row each rank holds.

A row is cut into 2 CP equal chunks, and rank r holds the chunks r and 2 CP - 1 - r: in
causal attention the later a query stands the more keys it sees, and so every rank has as
much to compute. Keys and values are gathered, so that segments go on naming keys by
their position in the row; queries are numbered within the rank's share.

Legend: CP context-parallel size, S positions of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nemo_spin.data.packing import Microbatch


def row_multiple(*, tp_size: int, cp_size: int, alignment: int) -> int:
    """What the length of a row must be a multiple of.

    Args:
        tp_size: Ranks that split a share once more (sequence parallelism); 1 without it.
        cp_size: CP.
        alignment: Positions that a rank's matrix products take at a time.
    """
    share = tp_size * alignment
    return cp_size * math.lcm(2, share) if cp_size > 1 else share


def chunks_by_rank(cp_size: int) -> list[tuple[int, int]]:
    """The two chunks of each rank."""
    return [(rank, 2 * cp_size - 1 - rank) for rank in range(cp_size)]


def share_of(microbatch: Microbatch, *, cp_rank: int, cp_size: int) -> Microbatch:
    """What one rank computes of a microbatch: its positions, and the tokens predicted there.

    Everything about responses, pairs and units stays whole.

    Args:
        microbatch: A whole one, whose rows have a length that `row_multiple` divides.
    """
    if cp_size == 1:
        return microbatch
    length = microbatch.input_ids.shape[1]
    size = length // (2 * cp_size)
    starts = [chunk * size for chunk in chunks_by_rank(cp_size)[cp_rank]]
    held = torch.cat([torch.arange(start, start + size) for start in starts])
    local = torch.full((length,), -1, dtype=torch.int64)
    local[held] = torch.arange(len(held))
    row, position = microbatch.target_positions // length, local[microbatch.target_positions % length]
    mine = position >= 0
    segments = microbatch.segments
    whole = [[0, length, 0, 0, 0, length]] if segments is None else segments.tolist()
    return replace(
        microbatch,
        input_ids=microbatch.input_ids[:, held],
        position_ids=microbatch.position_ids[:, held],
        segments=_cut(whole, starts, size),
        target_ids=microbatch.target_ids[mine],
        target_positions=(row * len(held) + position)[mine],
        target_responses=microbatch.target_responses[mine],
    )


def _cut(segments: Sequence[Sequence[int]], starts: Sequence[int], size: int) -> Tensor:
    """The parts of a row's segments that lie in the chunks at `starts`; [parts, 6] int32."""
    parts = []
    for offset, start in enumerate(starts):
        for first, count, prefix, prefix_count, *_ in segments:
            low, high = max(first, start), min(first + count, start + size)
            if low < high:
                query = offset * size + low - start
                parts.append((query, high - low, prefix, prefix_count, first, high - first))
    return torch.tensor(parts, dtype=torch.int32)
