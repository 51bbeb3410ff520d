"""From scored rows to the units of an optimizer step.

A *unit* is a prompt with its responses: the real one and k >= 1 generated ones (plain
fine-tuning: the real one alone). Its loss is the mean over its k pairs, and a global
batch is a number of units, so the weight of a demonstration does not depend on how often
its prompt was sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from nemo_spin.data.columns import joined

REAL_ONLY = ("real_ids",)
PAIRS = ("real_ids", "generated_ids")


class Units:
    """Token ids of a table, as slices of flat arrays (Arrow's own memory, not Python lists).

    Neighbouring rows of the same iteration and id are one unit; a table without these
    columns has a unit per row.

    Args:
        table: Columns `prompt_ids`, `real_ids` and, for pairs, `generated_ids`, the opponent's
            log-probabilities and, where they are needed, theta_0's (`pairs.with_base`).
        responses: `PAIRS`, or `REAL_ONLY` for plain fine-tuning.
    """

    def __init__(self, table: pa.Table, responses: Sequence[str] = PAIRS) -> None:
        self.num_rows = table.num_rows
        self._first_rows = _first_rows(table)
        self._prompts = _ListColumn(table["prompt_ids"])
        self._real = _ListColumn(table["real_ids"])
        self._generated = _ListColumn(table["generated_ids"]) if "generated_ids" in responses else None
        kinds = ("real", "generated") if self._generated else ("real",)
        self._opponent = _logps(table, [f"opponent_{kind}_logps" for kind in kinds])
        self._base = _logps(table, [f"base_{kind}_logps" for kind in kinds])

    @property
    def num_units(self) -> int:
        """Units of the table."""
        return len(self._first_rows) - 1

    def rows(self, unit: int) -> range:
        """The table's rows that make up `unit`; one per generated response."""
        return range(int(self._first_rows[unit]), int(self._first_rows[unit + 1]))

    def prompt(self, unit: int) -> np.ndarray:
        """Prompt ids, int32."""
        return self._prompts[int(self._first_rows[unit])]

    def responses(self, unit: int) -> list[np.ndarray]:
        """Response ids, the real one first, then the generated ones. int32."""
        real = self._real[int(self._first_rows[unit])]
        if self._generated is None:
            return [real]
        return [real, *(self._generated[row] for row in self.rows(unit))]

    def opponent_logps(self, unit: int) -> list[float]:
        """The opponent's sums for `responses(unit)`; zeros where the table is not scored."""
        return self._of_responses(self._opponent, unit)

    def base_logps(self, unit: int) -> list[float]:
        """theta_0's sums for `responses(unit)`; the opponent's where the table does not have them."""
        return self._of_responses(self._opponent if self._base is None else self._base, unit)

    def _of_responses(self, columns: list[np.ndarray] | None, unit: int) -> list[float]:
        if columns is None:
            return [0.0] * len(self.responses(unit))
        real = float(columns[0][self._first_rows[unit]])
        if self._generated is None:
            return [real]
        return [real, *(float(columns[1][row]) for row in self.rows(unit))]

    def token_counts(self) -> np.ndarray:
        """[units, 3] int64: tokens of the prompt, of all responses, and number of responses."""
        first = self._first_rows[:-1]
        responses, number = self._real.lengths()[first], np.ones(self.num_units, dtype=np.int64)
        if self._generated is not None and self.num_rows:
            responses = responses + np.add.reduceat(self._generated.lengths(), first)
            number = number + np.diff(self._first_rows)
        return np.stack([self._prompts.lengths()[first], responses, number], axis=1)

    def attended_pairs(self) -> np.ndarray:
        """[units] int64: pairs of a query and a key it sees, each unit's prompt computed once.

        A causal run of n tokens has n (n + 1) / 2 of them; a response also sees its prompt's m keys.
        """
        first = self._first_rows[:-1]
        prompts = self._prompts.lengths()
        seen: np.ndarray = _causal(prompts[first]) + _causal(self._real.lengths(), prompts)[first]
        if self._generated is not None and self.num_rows:
            seen = seen + np.add.reduceat(_causal(self._generated.lengths(), prompts), first)
        return seen


class _ListColumn:
    """A column of lists, without copies where it is in one piece."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        array = joined(column)
        self._offsets = array.offsets.to_numpy()
        self._values = array.values.to_numpy(zero_copy_only=False)

    def __getitem__(self, row: int) -> np.ndarray:
        ids: np.ndarray = self._values[self._offsets[row] : self._offsets[row + 1]]
        return ids

    def lengths(self) -> np.ndarray:
        lengths: np.ndarray = np.diff(self._offsets).astype(np.int64)
        return lengths


def _logps(table: pa.Table, names: Sequence[str]) -> list[np.ndarray] | None:
    known = all(name in table.column_names for name in names)
    return [table[name].to_numpy() for name in names] if known else None


def _causal(lengths: np.ndarray, prefixes: np.ndarray | int = 0) -> np.ndarray:
    """Pairs that causal runs see, each after a prefix that all of its tokens see."""
    pairs: np.ndarray = lengths * (lengths + 1) // 2 + lengths * prefixes
    return pairs


def _first_rows(table: pa.Table) -> np.ndarray:
    """[units + 1] int64: where units begin, and the number of rows."""
    starts = np.ones(table.num_rows, dtype=bool)
    if "id" in table.column_names and table.num_rows:
        changes = [
            column[1:] != column[:-1]
            for column in (
                table[name].to_numpy(zero_copy_only=False)
                for name in ("iteration", "id")
                if name in table.column_names
            )
        ]
        starts[1:] = np.logical_or.reduce(changes)
    return np.append(np.flatnonzero(starts), table.num_rows)


def epoch_order(num_units: int, *, seed: int, iteration: int, epoch: int) -> np.ndarray:
    """The order of units in one epoch: a permutation that depends on these four numbers only."""
    return np.random.default_rng([seed, iteration, epoch]).permutation(num_units)


@dataclass(frozen=True)
class Batches:
    """The global batches of one iteration, addressed by optimizer step.

    Attributes:
        num_units: Units of the table.
        global_batch_size: Units per optimizer step, over all data-parallel ranks.
        epochs: Passes over the units.
        seed, iteration: See `epoch_order`.
    """

    num_units: int
    global_batch_size: int
    epochs: int
    seed: int
    iteration: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass; the last batch of a pass may be short."""
        return -(-self.num_units // self.global_batch_size)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the iteration."""
        return self.steps_per_epoch * self.epochs

    def indices(self, step: int) -> np.ndarray:
        """The units of the global batch of optimizer step `step` (from 0). [<= global batch]."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.num_units, seed=self.seed, iteration=self.iteration, epoch=epoch)
        return order[position * self.global_batch_size : (position + 1) * self.global_batch_size]
