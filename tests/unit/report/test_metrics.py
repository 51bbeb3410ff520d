from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from nemo_spin.report import metrics
from nemo_spin.report.metrics import read_metrics


def write(path: Path, lines: list[dict[str, Any]], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail, encoding="utf-8")
    return path


def test_splits_become_columns_in_the_order_of_the_steps(tmp_path: Path) -> None:
    lines = [
        {"split": "train", "step": 1, "loss": 0.5},
        {"split": "train", "step": 0, "loss": 0.75},
        {"split": "heldout", "step": 1, "loss": 0.25},
    ]
    curves = read_metrics(write(tmp_path / "metrics.jsonl", lines))
    assert curves["train"] == {"step": [0.0, 1.0], "loss": [0.75, 0.5]}
    assert curves["heldout"] == {"step": [1.0], "loss": [0.25]}
    assert (curves["steps"], curves["averaged"], curves["not_finite"]) == (2, 1, {})


def test_gains_are_derived_per_token(tmp_path: Path) -> None:
    line = {
        "split": "train",
        "step": 0,
        "policy_real_logps_per_token": -1.5,
        "opponent_real_logps": -16.0,
        "real_tokens": 8.0,
    }
    train = read_metrics(write(tmp_path / "metrics.jsonl", [line]))["train"]
    assert train["opponent_real_logps_per_token"] == [-2.0]
    assert train["real_gain_per_token"] == [0.5]
    assert "generated_gain_per_token" not in train


def test_a_line_cut_short_is_left_out_and_the_last_line_of_a_step_counts(tmp_path: Path) -> None:
    lines = [{"split": "train", "step": 0, "loss": 9.0}, {"split": "train", "step": 0, "loss": 1.0}]
    path = write(tmp_path / "metrics.jsonl", lines, tail='[1]\n{"split": "train", "step": 1, "lo')
    assert read_metrics(path)["train"] == {"step": [0.0], "loss": [1.0]}


def test_a_missing_file_is_a_training_without_steps(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl")["steps"] == 0


def test_values_that_are_no_numbers_are_gaps_and_are_named(tmp_path: Path) -> None:
    losses = [0.5, math.nan, math.inf]
    lines = [{"split": "train", "step": step, "loss": loss} for step, loss in enumerate(losses)]
    curves = read_metrics(write(tmp_path / "metrics.jsonl", lines))
    assert curves["train"]["loss"] == [0.5, None, None]
    assert curves["not_finite"] == {"loss": 1}


def test_long_trainings_are_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_POINTS", 2)
    lines = [{"split": "train", "step": step, "loss": float(step)} for step in range(5)]
    curves = read_metrics(write(tmp_path / "metrics.jsonl", lines))
    assert curves["averaged"] == 3
    assert curves["train"]["loss"] == [1.0, 3.5]  # (0+1+2)/3, (3+4)/2
    assert curves["steps"] == 5
