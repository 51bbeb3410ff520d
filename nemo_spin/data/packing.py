"""Lays the units of a global batch out as microbatches: packed rows without padding.

With `shared_prompt` a unit's prompt stands once, then its responses, each attending to
the prompt and to itself; with `pairs` every response has a copy of the prompt before it;
with `none` every response is a padded sequence of its own, as other implementations do
it. The loss, its gradient and every log-probability are the same; the number of tokens
that are computed is not.

A packed row is described by *segments*: runs of queries that attend to an earlier run of
keys (their prompt, or nothing) and causally to the run they belong to.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nemo_spin.data.datasets import Units

PACKINGS = ("shared_prompt", "pairs", "none")
_PADDING_ID = 0


@dataclass(frozen=True)
class Microbatch:
    """One forward pass. Legend: B rows of S positions (packed: B = 1), Q responses, P pairs, U units.

    Attributes:
        input_ids: [B, S] int64; prompts, responses and, at the end, padding.
        position_ids: [B, S] int64; responses continue from their prompt.
        segments: [segments, 6] int32 on the CPU: first query and number of queries; first key
            and length of the prefix they all see; first key and length of the run they end and
            see causally (of a whole row: themselves). In positions of the row. None where each
            row is one causal sequence.
        target_ids: [tokens] int64, the tokens of all responses, one after the other.
        target_positions: [tokens] int64; b * S + s of the position that predicts each.
        target_responses: [tokens] int64; the response each token belongs to.
        response_tokens: [Q] int64; tokens of each response.
        opponent_logps: [Q] float64; the opponent's sums, 0 where unknown.
        base_logps: [Q] float64; theta_0's sums (`Units.base_logps`).
        pair_real, pair_generated: [P] int64; the two responses of each pair.
        pair_units: [P] int64; the unit of each pair.
        unit_real: [U] int64; the real response of each unit.
        unit_weights: [U] float32; 0 for a unit that only fills a batch.
        unit_rows: First row of each unit's rows in the table it came from, and their number.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor | None
    target_ids: Tensor
    target_positions: Tensor
    target_responses: Tensor
    response_tokens: Tensor
    opponent_logps: Tensor
    base_logps: Tensor
    pair_real: Tensor
    pair_generated: Tensor
    pair_units: Tensor
    unit_real: Tensor
    unit_weights: Tensor
    unit_rows: tuple[range, ...]

    @property
    def num_responses(self) -> int:
        """Q."""
        return int(self.opponent_logps.numel())

    @property
    def num_slots(self) -> int:
        """Token positions that are computed, padding included."""
        return int(self.input_ids.numel())

    def to(self, device: torch.device) -> Microbatch:
        """The same on `device`; segments stay on the CPU, where they are read."""
        moved: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in moved.items():
            if isinstance(value, Tensor) and name != "segments":
                moved[name] = value.to(device)
        return Microbatch(**moved)


@dataclass(frozen=True)
class Layout:
    """How units become microbatches.

    Attributes:
        packing: One of `PACKINGS`.
        micro_batch_tokens: Most token positions of a packed row; a longer unit gets one of its own.
        micro_batch_size: Units per microbatch without packing.
        pad_to_multiple: Row lengths become multiples of it (`row_multiple`).
    """

    packing: str
    micro_batch_tokens: int
    micro_batch_size: int
    pad_to_multiple: int = 1

    def unit_tokens(self, units: Units, indices: np.ndarray) -> np.ndarray:
        """Packed token positions of each of `indices`. [len(indices)] int64."""
        prompt, responses, number = units.token_counts()[indices].T
        copies = number if self.packing == "pairs" else np.ones_like(number)
        tokens: np.ndarray = prompt * copies + responses
        return tokens

    def microbatches(
        self, units: Units, indices: np.ndarray, *, dp_rank: int, dp_size: int
    ) -> list[list[int]]:
        """This rank's share of a global batch, as lists of units (-1: a ghost that only fills).

        Ranks together have every unit exactly once. Every rank has at least one microbatch.
        """
        if self.packing == "none":
            return _in_order(indices, size=self.micro_batch_size, dp_rank=dp_rank, dp_size=dp_size)
        tokens = self.unit_tokens(units, indices)
        bins = pack_for_ranks(tokens, self.micro_batch_tokens, dp_size)
        mine = spread([int(tokens[chosen].sum()) for chosen in bins], dp_size)[dp_rank]
        return [[int(indices[i]) for i in bins[b]] for b in mine] or [[-1]]

    def collate(self, units: Units, chosen: Sequence[int]) -> Microbatch:
        """Builds the microbatch of the units `chosen` (-1: a ghost)."""
        return _Builder(units, self).build(chosen)


def pack(sizes: np.ndarray, capacity: int) -> list[list[int]]:
    """Bins of item indices whose sizes sum to at most `capacity`, by best fit, largest first.

    An item above the capacity is alone in its bin. Deterministic.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free, bin), sorted
    for item in sorted(range(len(sizes)), key=lambda i: (-int(sizes[i]), i)):
        size = int(sizes[item])
        fitting = [entry for entry in room if entry[0] >= size]
        if fitting:
            best = min(fitting)
            room.remove(best)
            bins[best[1]].append(item)
            free = best[0] - size
        else:
            best = (0, len(bins))
            bins.append([item])
            free = capacity - size
        if free > 0:
            room.append((free, best[1]))
    return bins


def pack_for_ranks(sizes: np.ndarray, capacity: int, num_ranks: int) -> list[list[int]]:
    """Bins like those of `pack`, as many for each rank and of equal size where that is possible.

    A batch that would fit into fewer bins than there are ranks is cut finer, so that no
    rank waits for another.
    """
    tight = pack(sizes, capacity)
    num_bins = -(-len(tight) // num_ranks) * num_ranks
    even = [chosen for chosen in spread(sizes.tolist(), num_bins) if chosen]
    fits = all(sizes[chosen].sum() <= capacity or len(chosen) == 1 for chosen in even)
    return even if fits else tight


def spread(sizes: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Shares of bin indices whose sizes are as equal as largest-first assignment makes them."""
    loads = [(0, 0, rank) for rank in range(num_ranks)]
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        load, count, rank = heapq.heappop(loads)
        shares[rank].append(index)
        heapq.heappush(loads, (load + sizes[index], count + 1, rank))
    return shares


def _in_order(indices: np.ndarray, *, size: int, dp_rank: int, dp_size: int) -> list[list[int]]:
    """Microbatch m of rank r holds units [(m * dp_size + r) * size, ...), filled with ghosts."""
    rounds = max(1, -(-len(indices) // (size * dp_size)))
    filled = np.full(rounds * size * dp_size, -1, dtype=np.int64)
    filled[: len(indices)] = indices
    mine = filled.reshape(rounds, dp_size, size)[:, dp_rank]
    return [[int(unit) for unit in microbatch] for microbatch in mine]


class _Builder:
    """Collects the tensors of one microbatch."""

    def __init__(self, units: Units, layout: Layout) -> None:
        self._units = units
        self._layout = layout
        self._tokens: list[np.ndarray] = []  # packed: runs of the row; otherwise: whole sequences
        self._positions: list[np.ndarray] = []
        self._segments: list[tuple[int, ...]] = []
        self._end = 0
        self._targets: list[np.ndarray] = []
        self._predictors: list[tuple[int, int, int]] = []  # (position before, first position, count)

    def build(self, chosen: Sequence[int]) -> Microbatch:
        opponent: list[float] = []
        base: list[float] = []
        pairs: list[tuple[int, int, int]] = []
        reals: list[int] = []
        for number, index in enumerate(chosen):
            unit = max(index, 0)
            responses = self._units.responses(unit)
            real = len(opponent)
            reals.append(real)
            pairs.extend((real, real + 1 + i, number) for i in range(len(responses) - 1))
            opponent.extend(self._units.opponent_logps(unit))
            base.extend(self._units.base_logps(unit))
            self._add(self._units.prompt(unit), responses)
        input_ids, position_ids, segments = self._lay_out()
        real_of, generated_of, unit_of = (
            torch.tensor(column, dtype=torch.int64) for column in _columns(pairs)
        )
        return Microbatch(
            input_ids=input_ids,
            position_ids=position_ids,
            segments=segments,
            target_ids=torch.from_numpy(np.concatenate(self._targets).astype(np.int64)),
            target_positions=torch.from_numpy(self._target_positions(input_ids.shape[1])),
            target_responses=torch.from_numpy(
                np.repeat(np.arange(len(self._targets)), [len(ids) for ids in self._targets])
            ),
            response_tokens=torch.tensor([len(ids) for ids in self._targets], dtype=torch.int64),
            opponent_logps=torch.tensor(opponent, dtype=torch.float64),
            base_logps=torch.tensor(base, dtype=torch.float64),
            pair_real=real_of,
            pair_generated=generated_of,
            pair_units=unit_of,
            unit_real=torch.tensor(reals, dtype=torch.int64),
            unit_weights=torch.tensor([float(index >= 0) for index in chosen]),
            unit_rows=tuple(self._units.rows(index) if index >= 0 else range(0) for index in chosen),
        )

    def _add(self, prompt: np.ndarray, responses: list[np.ndarray]) -> None:
        self._targets.extend(responses)
        if self._layout.packing == "shared_prompt":
            start = self._append(prompt, first_position=0, prefix=(0, 0))
            for response in responses:
                first = self._append(response, first_position=len(prompt), prefix=(start, len(prompt)))
                self._predictors.append((start + len(prompt) - 1, first, len(response)))
        else:
            for response in responses:
                start = self._append(np.concatenate([prompt, response]), first_position=0, prefix=(0, 0))
                first = start + len(prompt)
                self._predictors.append((first - 1, first, len(response)))

    def _append(self, ids: np.ndarray, *, first_position: int, prefix: tuple[int, int]) -> int:
        start, self._end = self._end, self._end + len(ids)
        self._tokens.append(ids)
        self._positions.append(np.arange(first_position, first_position + len(ids)))
        self._segments.append((start, len(ids), *prefix, start, len(ids)))
        return start

    def _lay_out(self) -> tuple[Tensor, Tensor, Tensor | None]:
        multiple = self._layout.pad_to_multiple
        if self._layout.packing == "none":
            longest = -(-max(len(ids) for ids in self._tokens) // multiple) * multiple
            input_ids = np.full((len(self._tokens), longest), _PADDING_ID, dtype=np.int64)
            for row, ids in enumerate(self._tokens):
                input_ids[row, : len(ids)] = ids
            positions = np.broadcast_to(np.arange(longest), input_ids.shape).copy()
            return torch.from_numpy(input_ids), torch.from_numpy(positions), None
        if padding := -self._end % multiple:
            self._append(np.full(padding, _PADDING_ID), first_position=0, prefix=(0, 0))
        return (
            torch.from_numpy(np.concatenate(self._tokens).astype(np.int64))[None],
            torch.from_numpy(np.concatenate(self._positions).astype(np.int64))[None],
            torch.tensor([s for s in self._segments if s[1]], dtype=torch.int32),
        )

    def _target_positions(self, row_length: int) -> np.ndarray:
        """A response's first token is predicted where its prompt ends, the others one before them."""
        runs = []
        for row, (before, first, count) in enumerate(self._predictors):
            run = np.concatenate([[before], np.arange(first, first + count - 1)])[:count]
            if self._layout.packing == "none":
                run = run - self._segments[row][0] + row * row_length
            runs.append(run)
        return np.concatenate(runs).astype(np.int64)


def of_one_shape(microbatches: Sequence[Microbatch]) -> list[Microbatch]:
    """The same microbatches, padded to as many rows and positions as the largest of them has."""
    shapes = [microbatch.input_ids.shape for microbatch in microbatches]
    num_rows, length = max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
    return [_padded(microbatch, num_rows=num_rows, length=length) for microbatch in microbatches]


def _padded(microbatch: Microbatch, *, num_rows: int, length: int) -> Microbatch:
    own_rows, own_length = microbatch.input_ids.shape
    below_and_right = (0, length - own_length, 0, num_rows - own_rows)
    segments, padding = microbatch.segments, [own_length, length - own_length]
    if segments is not None and length > own_length:
        added = torch.tensor([[*padding, 0, 0, *padding]], dtype=segments.dtype)
        segments = torch.cat([segments, added])
    row, position = microbatch.target_positions // own_length, microbatch.target_positions % own_length
    return replace(
        microbatch,
        input_ids=functional.pad(microbatch.input_ids, below_and_right, value=_PADDING_ID),
        position_ids=functional.pad(microbatch.position_ids, below_and_right),
        segments=segments,
        target_positions=row * length + position,
    )


def _columns(pairs: list[tuple[int, int, int]]) -> list[list[int]]:
    return [list(column) for column in zip(*pairs, strict=True)] if pairs else [[], [], []]
