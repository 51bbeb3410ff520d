"""Leases, with two owners in one process: each has its own file, clock readings and heart."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nemo_spin.generation import leases as leases_module
from nemo_spin.generation.leases import Leases, LeaseSettings, forget

SILENT_S = 60.0


class Clock:
    """Time on the observer's machine."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(leases_module, "time", clock)
    return clock


@pytest.fixture(params=[True, False], ids=["links", "no links"])
def owners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[list[Leases]]:
    if not request.param:

        def refuse(*_: object) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", refuse)
    made = [Leases(LeaseSettings(str(tmp_path), f"owner-{index}", SILENT_S)) for index in range(3)]
    yield made
    for leases in made:
        leases.close()


def test_a_lease_has_one_owner_until_it_is_given_back(owners: list[Leases], clock: Clock) -> None:
    first, second, _ = owners
    assert first.take("a")
    assert not second.take("a")
    assert second.take("b")
    first.release("a")
    assert second.take("a")
    first.release("a")  # it is not the owner's any more
    assert not first.take("a")


def test_only_one_of_many_takes_a_lease(tmp_path: Path) -> None:
    everybody = [Leases(LeaseSettings(str(tmp_path), f"owner-{index}", SILENT_S)) for index in range(16)]
    with ThreadPoolExecutor(16) as pool:
        for name in map(str, range(20)):
            assert sum(pool.map(lambda leases, name=name: leases.take(name), everybody)) == 1
    for leases in everybody:
        leases.close()


def test_a_silent_owner_loses_its_lease_to_one_other(
    owners: list[Leases], clock: Clock, tmp_path: Path
) -> None:
    first, second, third = owners
    assert first.take("a")
    for leases in (second, third):
        assert not leases.take("a"), "seen for the first time"
    clock.now += SILENT_S - 1
    assert not second.take("a"), "not silent for long enough"
    clock.now += 2
    assert second.take("a")
    assert not third.take("a"), "it saw another lease"
    first.release("a")
    assert not third.take("a"), "the one that came back does not remove another's lease"
    assert not list(tmp_path.glob(".*.old"))


@pytest.mark.parametrize("written", [0, 1, 2**40], ids=["1970", "just after", "the far future"])
def test_a_sign_of_life_counts_whatever_time_it_says(
    owners: list[Leases], clock: Clock, tmp_path: Path, written: int
) -> None:
    first, second, _ = owners
    first.take("a")
    assert not second.take("a")
    clock.now += SILENT_S - 1
    os.utime(tmp_path / "a.lease", (written, written))  # by the clock of the owner's machine
    assert not second.take("a")
    clock.now += SILENT_S - 1
    assert not second.take("a")
    clock.now += 2
    assert second.take("a")


def test_a_lease_that_changed_hands_is_given_back(owners: list[Leases], clock: Clock, tmp_path: Path) -> None:
    """Two see a dead owner's lease; the slower one renames what is the faster one's by then."""
    first, second, third = owners
    first.take("a")
    for leases in (second, third):
        leases.take("a")
    clock.now += SILENT_S + 1
    seen = third._seen["a"]
    assert second.take("a")
    third._seen["a"] = seen
    assert not third._remove("a")
    if (tmp_path / "a.lease").exists():  # with hard links it is back
        assert not third.take("a")
    assert not list(tmp_path.glob(".*.old"))


def test_an_owner_shows_that_it_lives(tmp_path: Path) -> None:
    living = Leases(LeaseSettings(str(tmp_path), "living", 0.4))
    other = Leases(LeaseSettings(str(tmp_path), "other", 0.4))
    assert living.take("a")
    end = time.monotonic() + 1.2
    while time.monotonic() < end:
        assert not other.take("a")
        time.sleep(0.05)
    living.close()
    end = time.monotonic() + 5
    while not other.take("a"):
        assert time.monotonic() < end
        time.sleep(0.05)
    other.close()


def test_leases_of_a_dead_owner_are_forgotten(owners: list[Leases], clock: Clock, tmp_path: Path) -> None:
    first, second, third = owners
    assert first.take("a")
    assert second.take("b")
    forget(tmp_path, "owner-0")
    assert third.take("a")
    assert not third.take("b")
    forget(tmp_path / "nothing", "owner-0")
