"""Benchmarks of a run on the screen and in `status`."""

from __future__ import annotations

import io
from pathlib import Path

from nemo_spin.data.files import write_json
from nemo_spin.report import published
from nemo_spin.selfplay.benchmarks import run_benchmarks, screen_table, status_lines
from nemo_spin.selfplay.displays import PlainDisplay
from nemo_spin.selfplay.run_directory import RunDirectory


def make_run(path: Path, **change: object) -> RunDirectory:
    """Two models: gsm8k as the paper asks it (or with a change), and a quarter and a half right."""
    run = RunDirectory(path)
    files = run.iteration(0)
    files.path.mkdir(parents=True)
    shots, metric = published.TASKS["gsm8k"]
    for place, value in ((files.opponent_evaluation_path, 0.25), (files.evaluation_path, 0.5)):
        result = {"value": value, "num_fewshot": shots, "asked_metric": metric, "limit": None, **change}
        write_json(place, {"benchmarks": {"gsm8k": result}})
    return run


def test_all_models_then_the_papers(tmp_path: Path) -> None:
    found = run_benchmarks(make_run(tmp_path))
    assert found is not None
    lines = status_lines(found)
    assert lines[:3] == [
        "theta_0          gsm8k 25.00",
        "theta_1          gsm8k 50.00",
        "paper's theta_0  gsm8k 26.76",
    ]
    assert len(lines) == 2 + 5
    screen = io.StringIO()
    PlainDisplay(screen).show(screen_table(found))
    assert [line.split() for line in screen.getvalue().splitlines() if "theta_1" in line] == [
        ["theta_1", "50.00"],
        ["paper's", "theta_1", "35.10"],
    ]
    assert "arXiv 2401.01335" in screen.getvalue()


def test_what_was_asked_otherwise_stands_alone(tmp_path: Path) -> None:
    found = run_benchmarks(make_run(tmp_path, limit=10))
    assert found is not None and len(status_lines(found)) == 2
    screen = io.StringIO()
    PlainDisplay(screen).show(screen_table(found))
    assert "paper" not in screen.getvalue()
    assert run_benchmarks(RunDirectory(tmp_path / "nothing")) is None
