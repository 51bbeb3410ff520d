"""score: the opponent's log-probabilities of every response, once per iteration.

The opponent of an iteration is the model about to be trained, before its first update.
Its values are constants of the objective; computing them here means no second model is
held in memory later.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nemo_spin.bridge.import_hf import load_weights
from nemo_spin.data.columns import SCORED
from nemo_spin.data.datasets import Units
from nemo_spin.data.files import atomic_path, remove_partials, write_json, write_manifest
from nemo_spin.data.pairs import shard_paths
from nemo_spin.errors import GateError, explain
from nemo_spin.generation.canary import TOLERANCES
from nemo_spin.megatron.engine import Engine
from nemo_spin.megatron.runtime import first_rank_writes
from nemo_spin.selfplay.ranks.context import StageContext
from nemo_spin.selfplay.ranks.score_metrics import (
    FORWARD,
    METRICS_NAME,
    WRITING,
    ScoreMetrics,
    score_summary,
)

_UNITS_PER_CALL = 64  # per data-parallel rank: how often progress is reported


def score(context: StageContext) -> None:
    """Writes `scored/`. All ranks must call; finished shards are kept.

    Raises:
        GateError: The sampler drew from another model than the one that is trained.
    """
    engine, architecture = context.build_engine(
        context.here.opponent,
        lambda chunks, architecture: load_weights(chunks, context.here.opponent, architecture),
    )
    sources = _sources(context)
    _start(context)
    total = sum(pq.read_metadata(path).num_rows for _, path in sources)
    gate, metrics = SamplerGate(context), ScoreMetrics(context, engine, architecture)
    metrics.begin()
    done = 0
    for name, path in sources:
        target = context.here.scored / name
        if not target.exists():
            units = _score_shard(context, engine, path, target, report=partial(_report, context, done, total))
            metrics.finished(name, units)
        table = pq.read_table(target, partitioning=None)
        done += table.num_rows
        gate.add(table)
        context.progress.update(done, total, "pair")
    gate.check()
    with first_rank_writes(context.runtime) as writes:
        if writes:
            write_manifest(
                context.here.scored,
                stage="score",
                files=[name for name, _ in sources],
                inputs=context.inputs,
                counts={
                    "pairs": total,
                    **gate.counts(),
                    **score_summary(context.here.scored / METRICS_NAME),
                },
            )


def _sources(context: StageContext) -> list[tuple[str, Path]]:
    """(name of the scored file, generated file), of this iteration and the earlier ones mixed in."""
    assert context.iteration is not None, "scoring belongs to an iteration"
    first = max(0, context.iteration - context.config.spin.history)
    named = []
    for iteration in range(first, context.iteration + 1):
        generated = context.run.iteration(iteration).generated
        for split in ("train", "heldout") if iteration == context.iteration else ("train",):
            for path in shard_paths(generated, split):
                rest = path.name.removeprefix(f"{split}-")
                named.append((f"{split}-iter_{iteration:02d}-{rest}", path))
    return named


def _start(context: StageContext) -> None:
    """Shards of an unfinished scoring are kept only if they were made from the same inputs."""
    with first_rank_writes(context.runtime) as writes:
        if writes:
            directory = context.here.scored
            directory.mkdir(parents=True, exist_ok=True)
            remove_partials(directory)
            request = directory / "request.json"
            text = request.read_text(encoding="utf-8") if request.exists() else None
            write_json(request, context.inputs)
            if text != request.read_text(encoding="utf-8"):
                for path in [*directory.glob("*.parquet"), *directory.glob(METRICS_NAME)]:
                    path.unlink()


def _report(context: StageContext, before: int, total: int, done: int) -> None:
    context.progress.update(before + done, total, "pair")


def _score_shard(
    context: StageContext, engine: Engine, source: Path, target: Path, *, report: Callable[[int], None]
) -> Units:
    """Scores one file of generations; returns what was scored. All ranks must call."""
    table = pq.read_table(source, partitioning=None)
    units = Units(table)
    by_length = np.argsort(engine.layout.unit_tokens(units, np.arange(units.num_units)), kind="stable")
    size = context.runtime.dp_size * _UNITS_PER_CALL
    logps: dict[int, tuple[float, float]] = {}
    for start in range(0, units.num_units, size):
        with engine.meter.phase(FORWARD):
            logps.update(engine.score(units, by_length[start : start + size]))
        report(len(logps))
    with engine.meter.phase(WRITING), first_rank_writes(context.runtime) as writes:
        if writes:
            scored = [logps[row] for row in range(table.num_rows)]
            for index, kind in enumerate(("real", "generated")):
                values = pa.array([values[index] for values in scored], pa.float64())
                table = table.append_column(f"opponent_{kind}_logps", values)
            with atomic_path(target) as partial_path:
                pq.write_table(table.cast(SCORED), partial_path)
    return units


class SamplerGate:
    """Compares the sampler's log-probabilities of its own answers with Megatron's.

    Sampler values never enter the loss; they show whether the weights, the template and
    the positions that were served are those that are trained.
    """

    def __init__(self, context: StageContext) -> None:
        gates = context.config.spin.gates
        self._enabled = gates.sampler
        tolerance = gates.sampler_tolerance
        self._tolerance = TOLERANCES[context.agreement] if tolerance is None else tolerance
        self._iteration = context.iteration
        self._differences: list[np.ndarray] = []

    def add(self, table: pa.Table) -> None:
        """Takes the answers of this iteration's opponent; earlier ones had other weights."""
        mine = table.filter(pa.compute.equal(table["iteration"], self._iteration))
        tokens = np.maximum(mine["num_sampler_tokens"].to_numpy(), 1)
        difference = mine["sampler_logps"].to_numpy() - mine["opponent_generated_logps"].to_numpy()
        self._differences.append(np.abs(difference) / tokens)

    @property
    def difference(self) -> float:
        """Mean absolute difference per token, over responses; 0 without any."""
        values = np.concatenate(self._differences) if self._differences else np.zeros(0)
        return float(values.mean()) if len(values) else 0.0

    def counts(self) -> dict[str, float]:
        """For the manifest."""
        return {"sampler_difference": self.difference}

    def check(self) -> None:
        """Raises GateError where the difference is above the tolerance, or is not a number."""
        if not self._enabled or self.difference <= self._tolerance:
            return
        raise GateError(
            explain(
                "sampler gate (spin.gates.sampler_tolerance)",
                found=f"sampler and Megatron differ by {self.difference:.2g} nats per token",
                rule=f"at most {self._tolerance:g}: answers are drawn by the model that is trained",
                remedy="look at the weights, precision (generation.dtype), RoPE settings and stop tokens "
                "of the served directory; remove generated/ and scored/ of this iteration to redo them",
            )
        )
