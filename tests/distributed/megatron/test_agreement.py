"""What one rank decides or fails at, all do; files that only one of them sees change nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from nemo_spin.errors import DataError, NemoSpinError
from nemo_spin.megatron.checkpoint_files import checkpoint_path, list_checkpoints, write_record
from tests.distributed.harness import run_ranks


def _initialize() -> Any:
    from nemo_spin.megatron.runtime import initialize

    return initialize(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, seed=1, timeout_s=60)


def _of_all_ranks(value: Any) -> list[Any]:
    from torch import distributed

    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def _outcome(action: Any) -> tuple[str, Any]:
    """("", what it returned), or type and message of what it raised."""
    try:
        return "", action()
    except NemoSpinError as error:
        return type(error).__name__, str(error)


def _together(failing: dict[int, str]) -> list[tuple[str, Any]]:
    from nemo_spin.megatron.agreement import together

    rank = _initialize().rank

    def step() -> None:
        if rank in failing:
            raise DataError(failing[rank])

    return _of_all_ranks(_outcome(lambda: together(step)))


@pytest.mark.parametrize("failing", [{0: "zero"}, {1: "one"}, {0: "zero", 1: "one"}], ids=str)
def test_all_ranks_raise_what_one_raised(failing: dict[int, str]) -> None:
    outcomes = run_ranks(_together, 2, failing)
    assert [kind for kind, _ in outcomes] == ["DataError", "DataError"]
    for rank, (_, message) in enumerate(outcomes):
        expected = failing.get(rank, next(iter(failing.values())))
        assert message.startswith(expected)


def test_nothing_is_raised_where_nothing_failed() -> None:
    assert run_ranks(_together, 2, {}) == [("", None), ("", None)]


def _decided() -> list[Any]:
    """What ranks are told to do, and how rank 0's failure to decide reaches them."""
    from nemo_spin.megatron.agreement import from_first_rank

    rank = _initialize().rank

    def fail() -> None:
        raise DataError(f"found by rank {rank}")

    own = (
        from_first_rank(lambda: {"path": Path("of") / f"rank_{rank}"}),
        _outcome(lambda: from_first_rank(fail)),
    )
    return _of_all_ranks(own)


def test_rank_0_decides_for_all() -> None:
    expected = {"path": Path("of/rank_0")}, ("DataError", "found by rank 0")
    assert run_ranks(_decided, 2) == [expected, expected]


def _newest_while_rank_1_sees_old_directories(directory: Path) -> list[Any]:
    """A stand-in: on one machine both ranks see at once that a checkpoint was renamed."""
    from nemo_spin.megatron import checkpoint_files

    runtime, notes = _initialize(), list[str]()
    found = list_checkpoints(directory)
    listing = list_checkpoints if runtime.is_first_rank else lambda _: found
    with mock.patch.object(checkpoint_files, "list_checkpoints", listing):
        path = checkpoint_files.newest_whole_checkpoint(directory, runtime=runtime, note=notes.append)
    return _of_all_ranks((path, notes))


def test_the_newest_whole_checkpoint_where_a_rank_still_sees_one_that_was_set_aside(tmp_path: Path) -> None:
    for step in (2, 4):
        path = checkpoint_path(tmp_path, step)
        path.mkdir()
        (path / "__0_0.distcp").write_bytes(os.urandom(64))
        write_record(path, {})
    (checkpoint_path(tmp_path, 4) / "__0_0.distcp").write_bytes(b"")
    whole = checkpoint_path(tmp_path, 2)
    first, second = run_ranks(_newest_while_rank_1_sees_old_directories, 2, tmp_path)
    assert first[0] == second[0] == whole
    assert "step-00000004 is damaged" in first[1][0] and second[1] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [whole.name, "step-00000004.damaged"]
