from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_spin.errors import DataError
from nemo_spin.selfplay import state as states
from nemo_spin.selfplay.state import StateFile, read_state


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.json"


def test_says_what_is_running(path: Path) -> None:
    file = StateFile(path)
    file.started("train", 1)
    state = read_state(path)
    assert state is not None
    assert (state.status, state.stage, state.iteration) == ("running", "train", 1)
    assert state.stages["iter_01/train"].seconds is None
    assert state.owner is not None and state.owner.alive()


def test_says_what_is_done(path: Path) -> None:
    file = StateFile(path)
    file.started("prepare", None)
    file.ended(states.DONE)
    file.finished()
    state = read_state(path)
    assert state is not None
    assert state.status == "done"
    assert state.stages["prepare"].status == "done"
    assert state.stages["prepare"].seconds is not None


def test_time_of_attempts_that_were_killed_is_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(second) for second in range(0, 1000, 10))
    monkeypatch.setattr(states.time, "time", lambda: next(clock))
    StateFile(path).started("train", 0)  # started_at 0, updated_at 10; then killed
    second = StateFile(path)
    second.started("train", 0)  # 20, 30
    second.ended(states.INTERRUPTED)  # 40: 20 s
    third = StateFile(path)
    third.started("train", 0)  # 60
    third.ended(states.DONE)  # 80
    entry = json.loads(path.read_text())["stages"]["iter_00/train"]
    assert entry["attempts"] == 3
    assert entry["earlier_seconds"] == 10 + 20
    assert entry["seconds"] == 20


def test_done_once_more_does_not_add_up(path: Path) -> None:
    file = StateFile(path)
    for _ in range(2):
        file.started("export", 0)
        file.ended(states.DONE)
    assert file.state.stages["iter_00/export"].earlier_seconds == 0


def test_the_first_line_of_an_error(path: Path) -> None:
    file = StateFile(path)
    file.started("score", 0)
    file.ended(states.FAILED, "gate: 0.3\n  rule: …")
    state = read_state(path)
    assert state is not None
    assert (state.status, state.error) == ("failed", "gate: 0.3")
    assert StateFile(path).state.error is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"unknown": 1, "stages": {}}', '{"stages": {"a": 1}}']
)
def test_a_damaged_file_is_none(path: Path, text: str) -> None:
    path.write_text(text)
    assert read_state(path) is None
    StateFile(path).started("prepare", None)
    assert read_state(path) is not None


def test_a_full_disk_does_not_hide_what_failed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = StateFile(path)
    file.started("train", 0)

    def full(path: Path, value: object) -> None:
        raise DataError("full")

    monkeypatch.setattr(states, "write_json", full)
    file.ended(states.FAILED, "the disk is full")
    file.alive()
    with pytest.raises(DataError):
        file.started("train", 0)


def test_work_that_is_found_complete_counts_as_done(path: Path) -> None:
    StateFile(path).started("export", 0)  # killed between its manifest and its last word
    again = StateFile(path)
    assert again.state.stages["iter_00/export"].status == "interrupted"
    again.found_done("export", 0)
    again.found_done("score", 0)  # never started here: nothing to say
    state = read_state(path)
    assert state is not None and state.stages["iter_00/export"].status == "done"
    assert "iter_00/score" not in state.stages
