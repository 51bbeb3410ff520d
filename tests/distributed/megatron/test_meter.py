"""What several ranks measured becomes one reading: the first one's clock, the fullest memory, all slots."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.distributed.harness import run_ranks


class _Clock:
    """Stands for the clock, so that seconds are exact."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def _read(tensor: int, pipeline: int, context: int) -> dict[str, Any]:
    from nemo_spin.megatron import meter
    from nemo_spin.megatron.runtime import initialize

    runtime = initialize(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        context_parallel_size=context,
        seed=1,
    )
    clock, real_time = _Clock(), meter.time
    meter.time = clock  # type: ignore[assignment]
    try:
        mine = meter.Meter()
        clock.now += 0.25  # of no phase
        with mine.phase("evaluation"):
            list(mine.watch(iter([SimpleNamespace(num_slots=999)]), counts=True))  # type: ignore[list-item]
            clock.now += 2.0
        with mine.phase("computing"):
            with mine.collating():
                clock.now += 1.0 + runtime.rank
            clock.now += 4.0 - runtime.rank  # who collates less waits for the others
            for counts in (True, False):  # two model chunks of one rank
                batches = iter([SimpleNamespace(num_slots=10), SimpleNamespace(num_slots=1)])
                list(mine.watch(batches, counts=counts))  # type: ignore[arg-type]
        clock.now += 0.5 * runtime.rank
        first = mine.read(runtime, computing="computing", others=("evaluation", "logging"))
        clock.now += 3.0
        second = mine.read(runtime, computing="computing", others=())
    finally:
        meter.time = real_time
    return {"first": first, "second": second, "dp_size": runtime.dp_size}


@pytest.mark.parametrize(("tensor", "pipeline", "context"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_a_reading_of_two_ranks(tensor: int, pipeline: int, context: int) -> None:
    result = run_ranks(_read, 2, tensor, pipeline, context)
    first, second = result["first"], result["second"]
    assert first.seconds == 7.25
    assert first.data_seconds == 1.0
    assert first.phases == {"computing": 4.0, "evaluation": 2.0, "logging": 0.0}
    # ranks of one tensor-parallel group, and stages, see the same rows
    assert first.slots == 11 * result["dp_size"] * context
    assert first.peak_bytes > 2**20
    assert (second.seconds, second.data_seconds, second.slots) == (3.0, 0.0, 0)


def test_phases_do_not_overlap() -> None:
    from nemo_spin.megatron.meter import Meter

    meter = Meter()
    with meter.phase("outer"), pytest.raises(AssertionError, match="inner begins inside outer"):
        meter.phase("inner").__enter__()
