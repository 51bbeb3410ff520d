from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_spin.config.schema import Config
from nemo_spin.report import write
from nemo_spin.report.sources import RunSource
from nemo_spin.selfplay.reporting import refresh, run_source
from nemo_spin.selfplay.run_directory import RunDirectory
from nemo_spin.selfplay.state import DONE, FAILED, StateFile


def begun(path: Path) -> RunDirectory:
    run = RunDirectory(path)
    run.iteration(0).path.mkdir(parents=True)
    run.config_path.write_text("name: x\n")
    return run


def test_times_of_all_attempts(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    state = StateFile(run.state_path)
    for stage, iteration, ends in (
        ("prepare", None, [DONE]),
        ("train", 0, [FAILED, DONE]),
        ("export", 0, []),
    ):
        for end in ends:
            state.started(stage, iteration)
            state.ended(end)
        if not ends:
            state.started(stage, iteration)
    source = run_source(run)
    assert set(source.times) == {"prepare"}
    assert set(source.parts[0].times) == {"train"}  # the export has only begun
    assert source.parts[0].times["train"].attempts == 2
    assert source.status == "running"


def test_a_plain_fine_tuning_is_a_part_of_its_own(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.sft.metrics_path.write_text("")
    assert [part.iteration for part in run_source(run).parts] == [None]


def test_a_report_that_fails_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, warnings = begun(tmp_path / "run"), list[str]()
    refresh(run, warn=warnings.append)
    assert run.report_path.exists()
    assert warnings == []

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(write, "write_report", fail)
    refresh(run, warn=warnings.append)
    assert warnings == ["report.html could not be written: MemoryError"]


def test_the_loop_refreshes_it_after_every_stage_and_at_the_end(
    make_config: Callable[..., Config], run: Callable[[Config], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[str] = []

    def look(sources: list[RunSource], path: Path, **_: object) -> None:
        done = sum(len(part.times) for part in sources[0].parts) + len(sources[0].times)
        states.append(f"{done} {sources[0].status}")
        raise OSError("no room")

    monkeypatch.setattr(write, "write_report", look)
    said = run(make_config(spin={"iterations": 1}))
    assert states == [*(f"{done} running" for done in range(1, 8)), "7 done"]
    assert said.count("report.html could not be written: no room") == 8
    states.clear()
    run(make_config(spin={"iterations": 1}))  # everything is done
    assert states == []
