"""score: the opponent's log-probabilities of every response, once per iteration.

The opponent of an iteration is the model about to be trained, before its first update.
Its values are constants of the objective; computing them here means no second model is
held in memory later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nemo_spin.bridge.import_hf import load_weights
from nemo_spin.data.columns import SCORED
from nemo_spin.data.datasets import Units
from nemo_spin.data.files import atomic_path, remove_partials, write_json, write_manifest
from nemo_spin.megatron.agreement import from_first_rank
from nemo_spin.megatron.engine import Engine
from nemo_spin.megatron.runtime import first_rank_writes
from nemo_spin.selfplay.ranks.context import StageContext
from nemo_spin.selfplay.ranks.sampler_gate import GATE_COLUMNS, SamplerGate
from nemo_spin.selfplay.ranks.score_metrics import (
    FORWARD,
    METRICS_NAME,
    WRITING,
    ScoreMetrics,
    score_summary,
)
from nemo_spin.selfplay.ranks.score_sources import Source, base_sources, sources

_UNITS_PER_CALL = 64  # per data-parallel rank: how often progress is reported


def score(context: StageContext) -> None:
    """Writes `scored/`. All ranks must call; finished shards are kept.

    Raises:
        GateError: The sampler drew from another model than the one that is trained.
    """
    context.phase("loading the opponent")
    engine, architecture = context.build_engine(
        context.here.opponent,
        lambda chunks, architecture: load_weights(chunks, context.here.opponent, architecture),
    )
    scored, based = from_first_rank(lambda: (sources(context), base_sources(context)))
    missing = from_first_rank(lambda: _start(context, [source.name for source in [*scored, *based]]))
    metrics = ScoreMetrics(context, engine, architecture)
    context.phase("scoring")
    metrics.begin()
    total = sum(source.num_rows for source in [*scored, *based])
    done = 0
    for source in [*scored, *based]:
        if based and source is based[0]:  # the opponent has scored everything: now theta_0, in its place
            theta_0 = context.run.iteration(0).opponent
            load_weights(engine.chunks, theta_0, architecture)
        if source.name in missing:
            units = _score_shard(context, engine, source, report=partial(_report, context, done, total))
            metrics.finished(source.name, units)
        done += source.num_rows
        context.progress.update(done, total, "pair")
    context.phase("closing")
    with first_rank_writes(context.runtime) as writes:
        if writes:
            _close(context, scored, based)


def _start(context: StageContext, names: Sequence[str]) -> set[str]:
    """Shards of an unfinished scoring are kept only if they were made from the same inputs.

    Returns:
        Those of the files `names` that are not there.
    """
    directory = context.here.scored
    context.here.base.mkdir(parents=True, exist_ok=True)
    remove_partials(directory)
    request = directory / "request.json"
    text = request.read_text(encoding="utf-8") if request.exists() else None
    write_json(request, context.inputs)
    if text != request.read_text(encoding="utf-8"):
        for path in [*directory.rglob("*.parquet"), *directory.glob(METRICS_NAME)]:
            path.unlink()
    return {name for name in names if not (directory / name).exists()}


def _close(context: StageContext, scored: Sequence[Source], based: Sequence[Source]) -> None:
    """The sampler gate and, if it lets everything pass, the manifest; the first rank calls."""
    directory, gate = context.here.scored, SamplerGate(context)
    for source in scored:
        gate.add(pq.read_table(directory / source.name, columns=list(GATE_COLUMNS), partitioning=None))
    gate.check()
    write_manifest(
        directory,
        stage="score",
        files=[source.name for source in [*scored, *based]],
        inputs=context.inputs,
        counts={
            "pairs": sum(source.num_rows for source in scored),
            **gate.counts(),
            **score_summary(directory / METRICS_NAME),
        },
    )


def _report(context: StageContext, before: int, total: int, done: int) -> None:
    context.progress.update(before + done, total, "pair")


def _score_shard(
    context: StageContext, engine: Engine, source: Source, *, report: Callable[[int], None]
) -> Units:
    """Scores one file of generations; returns what was scored. All ranks must call."""
    table = source.table()
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
            with atomic_path(context.here.scored / source.name) as partial_path:
                pq.write_table(table.cast(SCORED), partial_path)
    return units
