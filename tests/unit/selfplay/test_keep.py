"""Which model is kept, and where the link to it points."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nemo_spin.selfplay.keep import LIKELIHOOD, SCORE, Candidate, choose, keep_model
from nemo_spin.selfplay.run_directory import RunDirectory


def models(*values: tuple[float | None, float | None]) -> list[Candidate]:
    return [
        Candidate(f"theta_{number}", Path("m"), score, likelihood)
        for number, (score, likelihood) in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("values", "keep", "name", "what"),
    [
        ([(0.5, -1.0), (0.7, -1.2), (0.6, -0.9)], "best", "theta_1", SCORE),
        ([(0.5, -1.0), (0.5, -0.9)], "best", "theta_0", SCORE),  # of equals the earliest
        ([(None, -1.0), (0.7, -1.2), (0.6, -0.9)], "best", "theta_2", LIKELIHOOD),
        ([(None, None), (None, -1.2)], "best", "theta_1", "the last"),
        ([(0.9, -1.0), (0.1, -3.0)], "last", "theta_1", "the last"),
    ],
)
def test_chosen(values: list[tuple[float | None, float | None]], keep: str, name: str, what: str) -> None:
    model, by = choose(models(*values), keep)
    assert (model.name, by) == (name, what)


def test_the_link_moves_with_the_run(tmp_path: Path) -> None:
    run, theta_0 = RunDirectory(tmp_path / "run"), tmp_path / "theta_0"
    run.path.mkdir()
    keep_model(run, theta_0, "best")
    assert run.kept.resolve() == theta_0
    model = run.iteration(0).model
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    chosen, _ = keep_model(run, theta_0, "last")
    assert chosen.name == "theta_1" and os.readlink(run.kept) == "iter_00/model"
    assert [path.name for path in run.path.iterdir() if path.name.endswith("partial")] == []
