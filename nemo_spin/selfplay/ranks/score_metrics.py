"""How fast scoring was: a line for each shard, and what they add up to."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_spin.data.datasets import Units
from nemo_spin.data.needed_work import NeededWork
from nemo_spin.megatron.architecture import Architecture
from nemo_spin.megatron.meter import Reading
from nemo_spin.megatron.sizes import shape_of
from nemo_spin.megatron.throughput import Throughput

if TYPE_CHECKING:
    from nemo_spin.megatron.engine import Engine
    from nemo_spin.selfplay.ranks.context import StageContext

FORWARD, WRITING = "forward", "writing"
METRICS_NAME = "metrics.jsonl"


class ScoreMetrics:
    """Writes `scored/metrics.jsonl` as shards are finished; lines of earlier attempts stay.

    Args:
        context: The stage.
        engine: Computes; its meter is read.
        architecture: The opponent's.
    """

    def __init__(self, context: StageContext, engine: Engine, architecture: Architecture) -> None:
        self._context = context
        self._meter = engine.meter
        self._path = context.here.scored / METRICS_NAME
        self._throughput = Throughput(
            shape_of(architecture),
            context.runtime,
            precision=context.precision,
            model=context.config.model,
        )

    def begin(self) -> None:
        """Scoring begins: what passed until now was preparation. All ranks must call."""
        self._read()
        self._write({"setup_seconds": time.monotonic() - self._context.started})

    def finished(self, shard: str, units: Units) -> None:
        """All of a shard is scored and written. All ranks must call."""
        needed = NeededWork(units).of(np.arange(units.num_units))
        reading = self._read()
        self._write(
            {
                "shard": shard,
                "pairs": needed.pairs,
                **self._throughput.columns(needed, reading, training=False),
                "seconds": reading.seconds,
                "data_seconds": reading.data_seconds,
                **{f"{name}_seconds": seconds for name, seconds in reading.phases.items()},
            }
        )

    def _read(self) -> Reading:
        return self._meter.read(self._context.runtime, computing=FORWARD, others=(WRITING,))

    def _write(self, line: dict[str, Any]) -> None:
        if self._context.runtime.is_first_rank:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")


def score_summary(path: Path) -> dict[str, float | None]:
    """What the lines of a scoring add up to, for its manifest. A line that was cut short is left out.

    Returns:
        `score_seconds` from the start of each attempt's processes; of these `setup_seconds` before
        the first shard, `data_seconds`, `forward_seconds` and `writing_seconds`; counts and rates
        as `megatron.throughput` defines them, rates over the time of the shards.
    """
    lines = [line for text in path.read_text(encoding="utf-8").splitlines() if (line := _parse(text))]
    shards = [line for line in lines if "shard" in line]

    def total(name: str) -> float:
        return float(sum(line.get(name, 0.0) for line in lines))

    seconds = total("seconds")
    result: dict[str, float | None] = {
        "score_seconds": total("setup_seconds") + seconds,
        **{f"{name}_seconds": total(f"{name}_seconds") for name in ("setup", "data", FORWARD, WRITING)},
    }
    if not shards:
        return result
    for name in ("useful_tokens", "packed_slots", "saved_prompt_tokens"):
        result[name] = total(name)
    for name in ("model_tflops", "peak_share"):
        known = all(line[name] is not None for line in shards)
        result[name] = sum(line[name] * line["seconds"] for line in shards) / seconds if known else None
    result["tokens_per_second"] = total("useful_tokens") / seconds
    result["peak_memory_gib"] = max(line["peak_memory_gib"] for line in shards)
    return result


def _parse(text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except ValueError:
        return {}
    return line if isinstance(line, dict) else {}
