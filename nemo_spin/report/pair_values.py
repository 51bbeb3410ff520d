"""What the files know of single pairs: lengths, the opponent's log-probabilities, margins.

An iteration's training leaves no log-probabilities of single pairs. But where earlier
iterations' generations are mixed in (`spin.history`), iteration t+1 scores the pairs of
iteration t under theta_{t+1}: exactly what the policy gave them after its last update. The
margin of a pair after its iteration follows from the two scorings, and so does the change
of the real response's log-probability, for which no history is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nemo_spin.data.files import read_manifest
from nemo_spin.data.pairs import shard_paths
from nemo_spin.report.sources import PartSource

SPLITS = ("train", "heldout")

_SCORES = ["id", "sample", "iteration", "opponent_real_logps", "opponent_generated_logps"]
_KEY = ["id", "sample"]
_IDS = ["real_ids", "generated_ids"]
_AFTER = ["real_after", "generated_after"]


@dataclass
class PairValues:
    """Of one iteration; every field is empty where the files do not tell.

    Attributes:
        real_lengths: Split -> tokens of the demonstrations, one per prompt.
        generated_lengths: Split -> tokens of the answers.
        real_logps_per_token: Split -> nats, under the opponent, one per pair.
        generated_logps_per_token: The same of the answers.
        margins: Columns `id`, `sample`, `margin` of the training pairs after the iteration.
        real_changes: Split -> columns `id`, `change` (nats): log-probability of the
            demonstration after the iteration less the one before it.
    """

    real_lengths: dict[str, np.ndarray] = field(default_factory=dict)
    generated_lengths: dict[str, np.ndarray] = field(default_factory=dict)
    real_logps_per_token: dict[str, np.ndarray] = field(default_factory=dict)
    generated_logps_per_token: dict[str, np.ndarray] = field(default_factory=dict)
    margins: pa.Table | None = None
    real_changes: dict[str, pa.Table] = field(default_factory=dict)


def pair_values(part: PartSource, following: PartSource | None) -> PairValues:
    """Reads what is known of an iteration's pairs; unfinished stages are left out.

    Args:
        part: The iteration.
        following: The one after it.

    Raises:
        DataError: A manifest cannot be read.
        OSError, pyarrow.ArrowException: A shard cannot be read.
    """
    values = PairValues()
    if part.iteration is None:
        return values
    if read_manifest(part.paths.generated) is not None:
        for split in SPLITS:
            _add_lengths(values, part.paths.generated, split)
    if read_manifest(part.paths.scored) is None:
        return values
    for split in SPLITS:
        _add_opponent_logps(values, part.paths.scored, split, part.iteration)
    if following is not None and read_manifest(following.paths.scored) is not None:
        _add_changes(values, part, following)
    return values


@dataclass(frozen=True)
class _MarginRule:
    """How an iteration's objective makes a margin of log-probabilities."""

    beta: float
    per_token: bool


def _margin_rule(part: PartSource) -> _MarginRule | None:
    """By the manifest of the training; None where it is not done, or took more than two scorings."""
    manifest = read_manifest(part.paths.train)
    settings = manifest.inputs.get("config", {}) if manifest else {}
    beta = settings.get("spin.beta")
    if not isinstance(beta, (int, float)) or settings.get("spin.opponent_mix"):
        return None
    return _MarginRule(float(beta), bool(settings.get("spin.length_normalized")))


def _add_lengths(values: PairValues, directory: Path, split: str) -> None:
    table = _read(directory, split, ["sample", *_IDS], lengths=True)
    if table.num_rows:
        first = table.filter(pc.equal(table["sample"], 0))
        values.real_lengths[split] = first["real_ids"].to_numpy()
        values.generated_lengths[split] = table["generated_ids"].to_numpy()


def _add_opponent_logps(values: PairValues, directory: Path, split: str, iteration: int) -> None:
    """Of this iteration's own answers; those mixed in from earlier ones are not counted again."""
    table = _read(directory, split, [*_SCORES, *_IDS], lengths=True)
    table = table.filter(pc.equal(table["iteration"], iteration))
    if table.num_rows:
        for kind, target in (
            ("real", values.real_logps_per_token),
            ("generated", values.generated_logps_per_token),
        ):
            tokens = np.maximum(table[f"{kind}_ids"].to_numpy(), 1)
            target[split] = table[f"opponent_{kind}_logps"].to_numpy() / tokens


def _add_changes(values: PairValues, part: PartSource, following: PartSource) -> None:
    assert part.iteration is not None, "plain fine-tuning scores nothing"
    rule = _margin_rule(part)
    for split in SPLITS:
        before = _scores(part.paths.scored, split, part.iteration)
        after = _read(following.paths.scored, split, _SCORES).rename_columns([*_KEY, "iteration", *_AFTER])
        if not before.num_rows or not after.num_rows:
            continue
        values.real_changes[split] = _real_changes(before, after)
        again = after.filter(pc.equal(after["iteration"], part.iteration)).drop_columns(["iteration"])
        if rule is not None and again.num_rows:
            values.margins = _margins(before.join(again, _KEY, join_type="inner"), rule)


def _real_changes(before: pa.Table, after: pa.Table) -> pa.Table:
    """A demonstration's log-probability does not depend on the answer it was paired with."""
    one_before = before.filter(pc.equal(before["sample"], 0)).select(["id", "opponent_real_logps"])
    one_after = after.select(["id", "real_after"]).group_by("id").aggregate([("real_after", "min")])
    both = one_before.join(one_after, "id", join_type="inner")
    change = pc.subtract(both["real_after_min"], both["opponent_real_logps"])
    return pa.table({"id": both["id"], "change": change})


def _margins(pairs: pa.Table, rule: _MarginRule) -> pa.Table:
    """beta [(policy - opponent)(real) - (policy - opponent)(generated)], after the iteration."""
    gains = []
    for kind in ("real", "generated"):
        gain = pc.subtract(pairs[f"{kind}_after"], pairs[f"opponent_{kind}_logps"])
        gains.append(
            pc.divide(gain, pc.max_element_wise(pairs[f"{kind}_ids"], 1)) if rule.per_token else gain
        )
    margin = pc.multiply(pc.subtract(*gains), rule.beta)
    return pa.table({"id": pairs["id"], "sample": pairs["sample"], "margin": margin})


def _scores(directory: Path, split: str, iteration: int) -> pa.Table:
    table = _read(directory, split, [*_SCORES, *_IDS], lengths=True)
    return table.filter(pc.equal(table["iteration"], iteration)).drop_columns(["iteration"])


def _read(directory: Path, split: str, columns: Sequence[str], *, lengths: bool = False) -> pa.Table:
    """The columns of all shards; with `lengths`, token ids are replaced by their number."""
    tables = []
    for path in shard_paths(directory, split):
        table = pq.read_table(path, columns=list(columns), partitioning=None)
        for name in _IDS if lengths else ():
            table = table.set_column(columns.index(name), name, pc.list_value_length(table[name]))
        tables.append(table)
    return pa.concat_tables(tables) if tables else pa.table({name: [] for name in columns})
