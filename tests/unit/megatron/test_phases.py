"""Ranks that meet at phases, as threads with a real store between them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from torch import distributed

from nemo_spin.errors import StageError
from nemo_spin.megatron import phases as phases_module
from nemo_spin.megatron.phases import Phases, is_of_a_collective

TIMEOUT_S = 1.0


def everywhere(world_size: int, act: Callable[[Phases, int], Any]) -> list[Any]:
    """Does something on all ranks at once; returns what each returned, or raised."""
    untyped: Any = distributed
    host = untyped.TCPStore("127.0.0.1", 0, world_size, True, timedelta(seconds=10), wait_for_workers=False)

    def rank_main(rank: int) -> Any:
        store = host if rank == 0 else untyped.TCPStore("127.0.0.1", host.port, world_size, False)
        try:
            return act(Phases(store, rank=rank, world_size=world_size, timeout_s=TIMEOUT_S), rank)
        except StageError as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(rank_main, range(world_size)))


def test_all_that_come_go_on_together() -> None:
    def act(phases: Phases, rank: int) -> str:
        for name in ("loading", "training", "training"):
            phases.enter(name)
        return phases.name

    assert everywhere(3, act) == ["training"] * 3
    assert everywhere(1, act) == ["training"]


def test_those_that_do_not_come_are_named_with_the_phase() -> None:
    def act(phases: Phases, rank: int) -> None:
        phases.enter("loading")
        if rank not in (1, 3):
            phases.enter("training")

    first, second, third, fourth = everywhere(4, act)
    assert (second, fourth) == (None, None)
    for rank, error in ((0, first), (2, third)):
        assert isinstance(error, StageError)
        assert f'phase "training" on rank {rank}: ranks 1, 3 did not reach the phase in 1 s' in str(error)
        assert "launcher.collective_timeout_s" in str(error)


def test_one_that_says_nothing_where_others_broke_off_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases_module, "_LAST_WORDS_S", 0.5)

    def act(phases: Phases, rank: int) -> StageError | None:
        phases.enter("training")
        return (
            None
            if rank == 1
            else phases.broke_off(RuntimeError("Timed out waiting 1000ms for recv operation"))
        )

    first, second, third = everywhere(3, act)
    assert second is None
    for error in (first, third):
        assert 'phase "training"' in str(error)
        assert (
            "broke off in the phase: Timed out waiting 1000ms for recv operation; no word from rank 1"
            in str(error)
        )


def test_which_exceptions_are_left_of_a_collective() -> None:
    assert is_of_a_collective(RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:1"))
    assert is_of_a_collective(distributed.DistNetworkError("reset"))
    assert not is_of_a_collective(RuntimeError("shape mismatch"))
    assert not is_of_a_collective(ValueError("Connection closed by peer"))
