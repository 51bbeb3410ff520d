"""How often a sampler that waits for others looks, by a clock that the test moves; leases are real."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_spin.generation import turns as turns_module
from nemo_spin.generation.engine import Sampling
from nemo_spin.generation.leases import Leases, LeaseSettings
from nemo_spin.generation.request import EngineSettings, GenerationRequest, Pass
from nemo_spin.generation.shards import plan_shards
from nemo_spin.generation.status import StatusWriter
from nemo_spin.generation.turns import turns


class Clock:
    """Sleeping takes no time; what is to happen meanwhile does."""

    now = 100.0

    def __init__(self, at: dict[float, Callable[[], None]]) -> None:
        self._at = at
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        for moment in [moment for moment in self._at if moment <= self.now]:
            self._at.pop(moment)()


@pytest.fixture
def request_(tmp_path: Path) -> GenerationRequest:
    engine = EngineSettings("vllm", "/model", "float32", 1, 64, 256, None, 512, 300, "a")
    shards = plan_shards("train", 8, 4)
    generation = Pass("train", "/data", Sampling(1.0, 1.0, 0, 8, (3,)), 1, 7, 0, "a", shards)
    leases = LeaseSettings(str(tmp_path / "leases"), "waiting", 120.0)
    paths = [str(tmp_path / name) for name in ("progress", "status", "log")]
    return GenerationRequest(engine, (generation,), str(tmp_path), *paths, canary=None, leases=leases)


def test_who_waits_looks_seldom_until_something_changes(
    tmp_path: Path, request_: GenerationRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, second) = (shard.file for shard in request_.passes[0].shards)
    other = Leases(LeaseSettings(str(tmp_path / "leases"), "other", 120.0))
    clock = Clock({200.0: (tmp_path / first).touch, 260.0: (tmp_path / second).touch})
    monkeypatch.setattr(turns_module, "time", clock)
    with contextlib.closing(other):
        assert other.take(first) and other.take(second)
        assert list(turns(request_, StatusWriter(Path(request_.status_path)))) == []
    assert clock.slept[:8] == [0.2] * 8
    assert max(clock.slept) == 4.0
    assert clock.slept[clock.slept.index(4.0) :].count(0.2) >= 8, "often again after the first shard"
    assert len(clock.slept) < 100, "instead of 800"
    assert clock.now < 260.0 + 4.0


def test_short_limits_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert turns_module._pause_s(1000.0, 2.0) == 0.2
    assert turns_module._pause_s(1000.0, 50.0) == 2.0
    assert turns_module._pause_s(8.0, 120.0) == 1.0
