"""Signs of life, seen by a clock that the test moves; one heart is real."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from nemo_spin.errors import StageError
from nemo_spin.selfplay import watchdog as watchdog_module
from nemo_spin.selfplay.heartbeat import Heartbeat, heartbeat_path
from nemo_spin.selfplay.watchdog import Watchdog


class Clock:
    now = 50.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watchdog_module, "time", clock)
    return clock


class Ranks:
    """The files of three ranks, touched by hand, by clocks that do not agree."""

    def __init__(self, directory: Path, clock: Clock) -> None:
        self._clock = clock
        self._progress_path = directory / "train.progress.jsonl"
        self._times = [10**9, 0, 2 * 10**18]  # nanoseconds
        self.watchdog = Watchdog(
            "train of iteration 0", progress_path=self._progress_path, ranks=3, silent_s=60.0
        )

    def beat(self, *ranks: int, phase: str = "training", backwards: bool = False) -> None:
        for rank in ranks:
            path = heartbeat_path(self._progress_path, rank)
            path.write_text(phase)
            self._times[rank] += -1000 if backwards else 1000
            os.utime(path, ns=(0, abs(self._times[rank])))

    def after(self, seconds: float, *, beating: tuple[int, ...], step: float = 5.0) -> None:
        end = self._clock.now + seconds
        while self._clock.now < end:
            self._clock.now += step
            self.beat(*beating)
            self.watchdog.check()


def test_ranks_that_beat_are_left_alone_whatever_their_clocks_say(tmp_path: Path, clock: Clock) -> None:
    ranks = Ranks(tmp_path, clock)
    ranks.beat(0, 1, 2)
    ranks.after(600, beating=(0, 1, 2))
    ranks.beat(2, backwards=True)
    ranks.after(30, beating=(0, 1))
    assert ranks.watchdog.phases() == 'ranks 0, 1, 2 in "training"'


def test_a_silent_rank_is_named_with_its_phase(tmp_path: Path, clock: Clock) -> None:
    ranks = Ranks(tmp_path, clock)
    ranks.beat(1, phase="loading")
    ranks.after(55, beating=(0, 2))
    with pytest.raises(StageError) as caught:
        ranks.after(15, beating=(0, 2))
    message = str(caught.value)
    assert 'rank 1 in "loading" gave no sign of life for 60 s; meanwhile ranks 0, 2 in "training"' in message
    assert "launcher.hang_timeout_s" in message


def test_a_rank_that_never_began_is_named_too(tmp_path: Path, clock: Clock) -> None:
    ranks = Ranks(tmp_path, clock)
    with pytest.raises(StageError, match='rank 2 in "not started" gave no sign of life'):
        ranks.after(70, beating=(0, 1))


def test_a_command_that_was_stopped_itself_judges_nobody(tmp_path: Path, clock: Clock) -> None:
    ranks = Ranks(tmp_path, clock)
    ranks.after(20, beating=(0, 1, 2))
    clock.now += 3600  # a laptop that slept, a debugger
    ranks.watchdog.check()
    ranks.after(20, beating=(0, 1, 2))


@pytest.mark.parametrize(("silent_s", "looks"), [(4.0, 4), (60.0, 30), (600.0, 5)])
def test_it_looks_as_seldom_as_the_limit_allows_and_is_not_late(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, silent_s: float, looks: int
) -> None:
    watchdog = Watchdog("train", progress_path=tmp_path / "progress", ranks=2, silent_s=silent_s)
    looked: list[int] = []
    monkeypatch.setattr(watchdog, "_look", lambda index, *_: looked.append(index))
    began = clock.now
    with pytest.raises(StageError):
        while True:
            clock.now += 0.125
            watchdog.check()
            if clock.now - began <= 30:
                in_half_a_minute = len(looked) // 2
    assert in_half_a_minute == looks
    assert clock.now - began <= max(silent_s + 1, 1.01 * silent_s)


def test_what_an_earlier_attempt_left_is_no_sign_of_life(tmp_path: Path, clock: Clock) -> None:
    Ranks(tmp_path, clock).beat(0, 1, 2)
    assert Ranks(tmp_path, clock).watchdog.phases() == 'ranks 0, 1, 2 in "not started"'


def test_a_heart_beats_by_itself_and_shows_the_phase(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "alive"
    heart = Heartbeat(path)
    heart.watched(0.2)
    heart.phase("a long phase")
    heart.phase("short")
    assert path.read_text() == "short"
    heart._beat_s = 0.01
    before, end = path.stat().st_mtime_ns, time.monotonic() + 12
    while path.stat().st_mtime_ns == before:
        assert time.monotonic() < end
        time.sleep(0.02)
