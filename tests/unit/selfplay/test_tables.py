from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from nemo_spin.data.files import write_json, write_manifest
from nemo_spin.selfplay import state as states
from nemo_spin.selfplay.run_directory import RunDirectory
from nemo_spin.selfplay.screen import Screen
from nemo_spin.selfplay.state import StateFile
from nemo_spin.selfplay.tables import show_iteration, show_run, shown

TRAINED = {
    "steps": 12,
    "loss": 0.61,
    "margin": 0.251,
    "accuracy": 0.75,
    "policy_real_logps": -12.25,
    "policy_generated_logps": -1234.5,
    "heldout_loss": 0.65,
    "heldout_margin": 0.125,
}
ANSWERED = {"mean_length": 16.25, "cut_share": 0.125}


def finish(directory: Path, counts: dict[str, Any]) -> None:
    directory.mkdir(parents=True)
    write_manifest(directory, stage=directory.name, files=[], inputs={}, counts=counts)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path)
    files = run.iteration(0)
    finish(files.generated, {"train": ANSWERED, "heldout": {**ANSWERED, "mean_length": 17.5}})
    finish(files.train, TRAINED)
    finish(files.model, {})
    for path, score in ((files.opponent_evaluation_path, 0.25), (files.evaluation_path, 0.5)):
        write_json(path, {"sampled": {"score": score, **ANSWERED}, "greedy": {"score": 0.75}})
    state = StateFile(run.state_path)
    for stage in ("generate", "train"):
        state.started(stage, 0)
        state.ended(states.DONE)
    for entry in state.state.stages.values():
        entry.seconds, entry.earlier_seconds = 65.0, 5.0
    state.finished()
    return run


def lines(stream: StringIO) -> list[list[str]]:
    """The words of every line."""
    return [line.split() for line in stream.getvalue().splitlines() if line.strip()]


def test_an_iteration(run: RunDirectory) -> None:
    stream = StringIO()
    show_iteration(Screen(stream), run, 0)
    rows = lines(stream)
    assert rows[0] == ["Iteration", "0"]
    assert ["loss", "0.610", "0.650"] in rows
    assert ["margin", "0.251", "0.125"] in rows
    assert ["accuracy", "0.750", "–"] in rows
    assert ["generated", "log-prob", "-1,234", "–"] in rows
    assert ["answer", "length", "of", "the", "opponent", "16.2", "17.5"] in rows
    assert ["answers", "cut", "by", "the", "limit", "12.5%", "12.5%"] in rows
    assert ["score,", "sampled", "–", "0.500"] in rows
    assert ["score,", "greedy", "–", "0.750"] in rows
    assert rows[-1] == ["generate", "1:10", "min", "train", "1:10", "min"]


def test_how_fast_it_was(run: RunDirectory) -> None:
    files = run.iteration(0)
    finish(files.scored, {"tokens_per_second": 4321.4})
    speed = {"tokens_per_second": 1234.5, "peak_share": 0.4125, "peak_memory_gib": 3.25}
    write_manifest(
        files.train,
        stage="train",
        files=[],
        inputs={},
        counts={**TRAINED, **speed, "pairs_per_second_with_scoring": 12.5},
    )
    stream = StringIO()
    show_iteration(Screen(stream), run, 0)
    words = "score 4,321 tokens/s train 1,234 tokens/s 41.2% of the peak both 12.5 pairs/s memory 3.2 GiB"
    assert lines(stream)[-1] == words.split()
    show_run(Screen(stream), run)
    assert "12.5" in lines(stream)[-2]


def test_all_iterations(run: RunDirectory) -> None:
    stream = StringIO()
    show_run(Screen(stream), run)
    rows = lines(stream)
    assert ["theta_0", "0.250", "0.750", "16.2", "12.5%", "–", "–", "–"] in rows
    assert ["theta_1", "0.500", "0.750", "16.2", "12.5%", "0.650", "0.125", "2:20", "min"] in rows
    assert str(run.iteration(0).model) in stream.getvalue()


def test_perplexity_of_held_out_demonstrations(run: RunDirectory) -> None:
    real = {"policy_real_logps": -24.0, "policy_real_logps_per_token": -2.0, "opponent_real_logps": -18.0}
    measured = {f"heldout_{name}": value for name, value in real.items()}
    write_manifest(run.iteration(0).train, stage="train", files=[], inputs={}, counts={**TRAINED, **measured})
    stream = StringIO()
    show_run(Screen(stream), run)
    (theta_0, theta_1) = (row for row in lines(stream) if row[0].startswith("theta_"))
    assert theta_0[5] == "4.482" and theta_1[5] == "7.389"  # e^(18/12) and e^(24/12)


def test_nothing_yet(tmp_path: Path) -> None:
    stream = StringIO()
    show_run(Screen(stream), RunDirectory(tmp_path))
    show_iteration(Screen(stream), RunDirectory(tmp_path), 3)
    assert "theta_0" in stream.getvalue()


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"sampled": 3}', '{"sampled": {"score": "high"}}'])
def test_damaged_numbers_are_left_out(run: RunDirectory, damage: str) -> None:
    run.iteration(0).evaluation_path.write_text(damage)
    (run.iteration(0).train / "manifest.json").write_text("{")
    stream = StringIO()
    show_iteration(Screen(stream), run, 0)
    show_run(Screen(stream), run)
    assert "0.500" not in stream.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0.000"), (-0.12345, "-0.123"), (12.34, "12.3"), (-98765.4, "-98,765")],
)
def test_numbers(value: float | None, text: str) -> None:
    assert shown(value) == text
