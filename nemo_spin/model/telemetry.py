"""What one training reports of its speed, beside its losses."""

from __future__ import annotations

import numpy as np

from nemo_spin.data.datasets import Units
from nemo_spin.data.needed_work import NeededWork
from nemo_spin.megatron.meter import GIB, Meter, Reading
from nemo_spin.megatron.runtime import Runtime
from nemo_spin.megatron.throughput import Throughput

COMPUTING = "forward_backward"
_OTHERS = ("optimizer", "checkpoint", "evaluation", "logging")


class Telemetry:
    """Reads a meter once per optimizer step.

    Args:
        units: What is trained on.
        throughput: Makes rates of counts.
        meter: Of the engine that trains.
        runtime: This rank's place.
    """

    def __init__(self, units: Units, throughput: Throughput, *, meter: Meter, runtime: Runtime) -> None:
        self._needed = NeededWork(units)
        self._throughput = throughput
        self._meter = meter
        self._runtime = runtime

    def step(self, indices: np.ndarray) -> dict[str, float | None]:
        """Columns of the optimizer step over units `indices`. All ranks must call.

        Returns:
            Those of `Throughput.columns`, `pairs`, and seconds: `step_seconds` since the step
            before, of which `data_seconds`, `forward_backward_seconds` and `optimizer_seconds` went
            into this step, `checkpoint_seconds`, `evaluation_seconds` and `logging_seconds` into
            what followed the step before. The few that are left are Lightning's.
        """
        needed, reading = self._needed.of(indices), self._read()
        return {
            "pairs": needed.pairs,
            **self._throughput.columns(needed, reading, training=True),
            **_seconds(reading),
        }

    def closing(self) -> dict[str, float | None]:
        """The seconds since the last step, and the peak memory. All ranks must call."""
        reading = self._read()
        return {**_seconds(reading), "peak_memory_gib": reading.peak_bytes / GIB}

    def _read(self) -> Reading:
        return self._meter.read(self._runtime, computing=COMPUTING, others=_OTHERS)


def _seconds(reading: Reading) -> dict[str, float | None]:
    phases = {f"{name}_seconds": seconds for name, seconds in reading.phases.items()}
    return {"step_seconds": reading.seconds, "data_seconds": reading.data_seconds, **phases}
