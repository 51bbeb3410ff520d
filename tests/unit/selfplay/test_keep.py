"""Which model is kept, and where the link to it points."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nemo_spin.selfplay.keep import (
    GREEDY,
    LIKELIHOOD,
    SCORE,
    Candidate,
    choose,
    describe_scores,
    keep_model,
)
from nemo_spin.selfplay.run_directory import RunDirectory

Values = tuple[float | None, float | None, float | None]  # score of sampled and greedy answers, likelihood


def models(*values: Values) -> list[Candidate]:
    return [Candidate(f"theta_{number}", Path("m"), *of_model) for number, of_model in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "keep", "name", "what"),
    [
        ([(0.5, 0.9, -1.0), (0.7, 0.8, -1.2), (0.6, 0.9, -0.9)], "best", "theta_1", SCORE),
        ([(0.5, 0.8, -1.0), (0.5, 0.9, -0.9)], "best", "theta_0", SCORE),  # of equals the earliest
        ([(None, 0.9, -1.0), (None, 0.8, -0.9)], "best", "theta_0", GREEDY),
        ([(None, 0.9, -1.0), (0.7, None, -1.2), (0.6, 0.8, -0.9)], "best", "theta_2", LIKELIHOOD),
        ([(None, None, None), (None, None, -1.2)], "best", "theta_1", "the last"),
        ([(0.9, 0.9, -1.0), (0.1, 0.1, -3.0)], "last", "theta_1", "the last"),
    ],
)
def test_chosen(values: list[Values], keep: str, name: str, what: str) -> None:
    model, by = choose(models(*values), keep)
    assert (model.name, by) == (name, what)


def test_both_scores_are_said_beside_the_choice() -> None:
    found = models((0.652, 0.982, None), (0.688, 0.975, None), (0.732, 0.98, None))
    best, _ = choose(found, "best")
    assert describe_scores(best, found) == "sampled 0.732, greedy 0.980 (best: theta_0, 0.982)"
    assert describe_scores(found[0], found) == "sampled 0.652 (best: theta_2, 0.732), greedy 0.982"
    silent = models((None, None, -1.0), (None, 0.5, -1.0))
    assert [describe_scores(model, silent) for model in silent] == [None, "greedy 0.500"]


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
