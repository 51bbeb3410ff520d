"""Which answers an iteration scores: its own, and those of earlier ones that are mixed in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nemo_spin.config.iterations import mixed_iterations
from nemo_spin.data.mixture import chosen_ids
from nemo_spin.data.pairs import shard_paths
from nemo_spin.selfplay.ranks.context import StageContext


@dataclass(frozen=True)
class Source:
    """Rows of one generated file.

    Attributes:
        name: Of the scored file, within `scored/`.
        path: The generated file.
        num_rows: How many of its rows are scored.
        ids: The prompts they answer; None: all.
    """

    name: str
    path: Path
    num_rows: int
    ids: pa.Array | None = None

    def table(self) -> pa.Table:
        """The rows."""
        table = pq.read_table(self.path, partitioning=None)
        return table if self.ids is None else table.filter(pc.is_in(table["id"], self.ids))


def sources(context: StageContext) -> list[Source]:
    """What is scored under the opponent: held-out rows of this iteration, training rows of all mixed."""
    assert context.iteration is not None, "scoring belongs to an iteration"
    spin, found = context.config.spin, []
    for iteration in mixed_iterations(spin, context.iteration):
        age = context.iteration - iteration
        found += _of_iteration(context, iteration, "train", amount=spin.mixture[age] if spin.mixture else 1)
        if age == 0:
            found += _of_iteration(context, iteration, "heldout", amount=1)
    return found


def base_sources(context: StageContext) -> list[Source]:
    """What is scored under theta_0 too, for a mixed opponent: all answers of this iteration's opponent.

    Earlier answers were scored when they were new, and those of iteration 0 are theta_0's own.
    """
    assert context.iteration is not None, "scoring belongs to an iteration"
    if not context.config.spin.opponent_mix or context.iteration == 0:
        return []
    found = [
        source
        for split in ("train", "heldout")
        for source in _of_iteration(context, context.iteration, split, amount=1)
    ]
    folder = context.here.base.relative_to(context.here.scored)
    return [Source(str(folder / source.name), source.path, source.num_rows) for source in found]


def _of_iteration(context: StageContext, iteration: int, split: str, *, amount: float) -> list[Source]:
    """The files of one iteration's answers.

    Args:
        context: The stage.
        iteration: Whose answers.
        split: `train` or `heldout`.
        amount: Of the prompts: `data.mixture.num_chosen`; 1 for all.
    """
    ids_of = {
        path: pq.read_table(path, columns=["id"], partitioning=None)["id"]
        for path in shard_paths(context.run.iteration(iteration).generated, split)
    }
    ids = None
    if amount != 1 and ids_of:
        every = pa.chunked_array([chunk for column in ids_of.values() for chunk in column.chunks])
        seed = (context.config.seed, context.iteration or 0, iteration)
        ids = chosen_ids(every, amount, seed=seed)
    found = []
    for path, column in ids_of.items():
        rows = len(column) if ids is None else pc.sum(pc.is_in(column, ids)).as_py() or 0
        rest = path.name.removeprefix(f"{split}-")
        if rows:
            found.append(Source(f"{split}-iter_{iteration:02d}-{rest}", path, rows, ids))
    return found
