"""From scored rows to the microbatches of an optimizer step.

A global batch is a list of row indices; every data-parallel rank takes the same number
of microbatches from it. Where a batch is short (the end of an epoch), the missing rows
are ghosts: row 0 with weight 0, which add nothing to a sum. Losses are summed and
divided once by the number of real rows in the global batch, so neither ghosts, nor
microbatching, nor data parallelism change a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

_PADDING_ID = 0


@dataclass(frozen=True)
class Microbatch:
    """Sequences of one forward pass, padded at the end to the same length.

    With B sequences of S positions (pairs: real and generated responses alternate, so
    B is twice the number of pairs).

    Attributes:
        input_ids: [B, S] int64; prompt and response.
        position_ids: [B, S] int64; 0 ... S-1.
        target_ids: [R] int64, all response tokens of all sequences, one after the other.
        target_positions: [R] int64; flat index b * S + s of the position that predicts each.
        target_sequences: [R] int64; the sequence each target belongs to.
        weights: [B] float32; 0 for ghosts.
        opponent_logps: [B] float64; the opponent's sum for each response, 0 where unknown.
        rows: Row index of each unit in the table it came from; -1 for ghosts.
    """

    input_ids: Tensor
    position_ids: Tensor
    target_ids: Tensor
    target_positions: Tensor
    target_sequences: Tensor
    weights: Tensor
    opponent_logps: Tensor
    rows: tuple[int, ...]

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.input_ids.shape[0]

    def to(self, device: torch.device) -> Microbatch:
        """The same on `device`."""
        tensors = {k: v.to(device) for k, v in self.__dict__.items() if isinstance(v, Tensor)}
        return Microbatch(**tensors, rows=self.rows)


class Rows:
    """Token ids of a table, as slices of flat arrays (Arrow's own memory, not Python lists).

    Args:
        table: Columns `prompt_ids`, `real_ids` and, for pairs, `generated_ids` and the
            opponent's log-probabilities.
        responses: The response columns of a unit, in order.
    """

    def __init__(self, table: pa.Table, responses: Sequence[str] = ("real_ids", "generated_ids")) -> None:
        self.num_rows = table.num_rows
        self._prompts = _ListColumn(table["prompt_ids"])
        self._responses = [_ListColumn(table[name]) for name in responses]
        logps = [name.replace("_ids", "_logps") for name in responses]
        names = [f"opponent_{name}" for name in logps]
        self._opponent = (
            [table[name].to_numpy() for name in names]
            if all(name in table.column_names for name in names)
            else None
        )

    @property
    def sequences_per_row(self) -> int:
        """Responses of one row: two for a pair, one for plain fine-tuning."""
        return len(self._responses)

    def sequences(self, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(prompt ids, response ids) of every response of `row`."""
        prompt = self._prompts[row]
        return [(prompt, column[row]) for column in self._responses]

    def opponent_logps(self, row: int) -> list[float]:
        """The opponent's sums for the responses of `row`."""
        return [float(column[row]) for column in self._opponent] if self._opponent else []

    def lengths(self) -> np.ndarray:
        """Longest sequence of every row, in tokens. [rows] int64."""
        return self._prompts.lengths() + np.max([column.lengths() for column in self._responses], axis=0)


class _ListColumn:
    def __init__(self, column: pa.ChunkedArray) -> None:
        array = column.combine_chunks()
        self._offsets = array.offsets.to_numpy()
        self._values = array.values.to_numpy(zero_copy_only=False)

    def __getitem__(self, row: int) -> np.ndarray:
        return self._values[self._offsets[row] : self._offsets[row + 1]]

    def lengths(self) -> np.ndarray:
        return np.diff(self._offsets).astype(np.int64)


def collate(rows: Rows, indices: Sequence[int], *, pad_to_multiple: int = 1) -> Microbatch:
    """Pads the sequences of `indices` (-1: a ghost) to the longest of them.

    Args:
        pad_to_multiple: Sequence lengths become multiples of it (sequence parallelism
            needs the tensor-parallel size).
    """
    sequences = [pair for index in indices for pair in rows.sequences(max(index, 0))]
    lengths = [len(prompt) + len(response) for prompt, response in sequences]
    longest = -(-max(lengths) // pad_to_multiple) * pad_to_multiple
    input_ids = np.full((len(sequences), longest), _PADDING_ID, dtype=np.int64)
    targets, positions, owners = [], [], []
    for b, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        input_ids[b, : len(prompt)] = prompt
        input_ids[b, len(prompt) : end] = response
        targets.append(response)
        positions.append(b * longest + np.arange(len(prompt) - 1, end - 1))
        owners.append(np.full(len(response), b))
    repeat = rows.sequences_per_row
    opponent = [value for index in indices for value in rows.opponent_logps(max(index, 0))]
    return Microbatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.arange(longest).expand(len(sequences), longest).contiguous(),
        target_ids=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        target_positions=torch.from_numpy(np.concatenate(positions).astype(np.int64)),
        target_sequences=torch.from_numpy(np.concatenate(owners).astype(np.int64)),
        weights=torch.tensor([float(index >= 0) for index in indices for _ in range(repeat)]),
        opponent_logps=torch.tensor(opponent or [0.0] * len(sequences), dtype=torch.float64),
        rows=tuple(indices),
    )


def epoch_order(num_rows: int, *, seed: int, iteration: int, epoch: int) -> np.ndarray:
    """The order of rows in one epoch: a permutation that depends on these four numbers only."""
    return np.random.default_rng([seed, iteration, epoch]).permutation(num_rows)


@dataclass(frozen=True)
class Batches:
    """The global batches of one iteration, addressed by optimizer step.

    Attributes:
        num_rows: Rows of the table.
        global_batch_size: Rows per optimizer step, over all data-parallel ranks.
        epochs: Passes over the rows.
        seed, iteration: See `epoch_order`.
    """

    num_rows: int
    global_batch_size: int
    epochs: int
    seed: int
    iteration: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass; the last batch of a pass may be short."""
        return -(-self.num_rows // self.global_batch_size)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the iteration."""
        return self.steps_per_epoch * self.epochs

    def indices(self, step: int) -> np.ndarray:
        """Row indices of the global batch of optimizer step `step` (from 0). [<= global batch]."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.num_rows, seed=self.seed, iteration=self.iteration, epoch=epoch)
        return order[position * self.global_batch_size : (position + 1) * self.global_batch_size]


def share_of_rank(
    indices: np.ndarray, *, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[list[int]]:
    """This rank's microbatches of a global batch, filled with ghosts (-1) to equal size.

    Microbatch m of rank r holds rows [(m * dp_size + r) * micro_batch_size, ...).
    """
    per_round = micro_batch_size * dp_size
    num_microbatches = max(1, -(-len(indices) // per_round))
    filled = np.full(num_microbatches * per_round, -1, dtype=np.int64)
    filled[: len(indices)] = indices
    grid = filled.reshape(num_microbatches, dp_size, micro_batch_size)
    return [[int(i) for i in microbatch] for microbatch in grid[:, dp_rank]]


def collated(
    rows: Rows, microbatches: Sequence[Sequence[int]], *, pad_to_multiple: int, device: torch.device
) -> Iterator[Microbatch]:
    """Collates microbatches one by one, as a schedule asks for them."""
    for indices in microbatches:
        yield collate(rows, indices, pad_to_multiple=pad_to_multiple).to(device)
