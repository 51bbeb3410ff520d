"""What the lines of a training add up to, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_spin.model.summary import summary


def step(number: int, seconds: float, tokens: int, **more: Any) -> dict[str, Any]:
    return {
        "split": "train",
        "step": number,
        "loss": 0.5 + number,
        "margin": 0.25,
        "pairs": 4,
        "useful_tokens": tokens,
        "packed_slots": 2 * tokens,
        "saved_prompt_tokens": 7,
        "tokens_per_second": tokens / seconds,
        "model_tflops": 10.0 / seconds,
        "peak_share": 0.1 / seconds,
        "peak_memory_gib": 1.0 + number,
        "step_seconds": seconds,
        "data_seconds": 0.25,
        "forward_backward_seconds": seconds / 2,
        "optimizer_seconds": 0.125,
        "checkpoint_seconds": 0.0,
        "evaluation_seconds": 0.0,
        "logging_seconds": 0.0625,
        **more,
    }


LINES = [
    {"split": "start", "step": -1, "setup_seconds": 10.0},
    step(0, 4.0, 100),
    step(1, 1.0, 200, checkpoint_seconds=0.5),
    {"split": "heldout", "step": 1, "loss": 0.625},
    {"split": "end", "step": 1, "step_seconds": 5.0, "evaluation_seconds": 3.0, "peak_memory_gib": 2.5},
]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_by_hand(tmp_path: Path) -> None:
    counts = summary(write(tmp_path / "metrics.jsonl", LINES))
    assert (counts["steps"], counts["first_loss"], counts["loss"], counts["heldout_loss"]) == (
        2,
        0.5,
        1.5,
        0.625,
    )
    assert counts["train_seconds"] == 10 + 4 + 1 + 5
    assert (counts["setup_seconds"], counts["evaluation_seconds"], counts["checkpoint_seconds"]) == (
        10,
        3,
        0.5,
    )
    assert (counts["pairs"], counts["useful_tokens"], counts["packed_slots"]) == (8, 300, 600)
    assert (counts["useful_share"], counts["saved_prompt_tokens"]) == (0.5, 14)
    assert counts["tokens_per_second"] == 300 / 5
    # 10 and 10 units of work in 4 + 1 seconds
    assert counts["model_tflops"] == pytest.approx(20 / 5)
    assert counts["peak_share"] == pytest.approx(0.2 / 5)
    assert counts["peak_memory_gib"] == 2.5


def test_what_no_device_knows_stays_unknown(tmp_path: Path) -> None:
    lines = [{**line, "peak_share": None} if "peak_share" in line else line for line in LINES]
    assert summary(write(tmp_path / "metrics.jsonl", lines))["peak_share"] is None


def test_a_training_without_steps(tmp_path: Path) -> None:
    assert summary(write(tmp_path / "metrics.jsonl", LINES[:1])) == {"steps": 0}
