"""What the lines of a scoring add up to, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_spin.selfplay.ranks.score_metrics import score_summary


def shard(name: str, seconds: float, tokens: int, peak_share: float | None) -> dict[str, Any]:
    return {
        "shard": name,
        "pairs": 8,
        "useful_tokens": tokens,
        "packed_slots": tokens + 10,
        "saved_prompt_tokens": 5,
        "model_tflops": 12.0 / seconds,
        "peak_share": peak_share,
        "peak_memory_gib": seconds,
        "seconds": seconds,
        "data_seconds": 0.25,
        "forward_seconds": 0.5,
        "writing_seconds": 0.125,
    }


def test_two_attempts_and_a_line_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"setup_seconds": 8.0},
        shard("a", 1.0, 100, 0.5),
        {"setup_seconds": 4.0},
        shard("b", 3.0, 60, 0.25),
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"shard": "c", "sec')
    counts = score_summary(path)
    assert counts["score_seconds"] == 8 + 1 + 4 + 3
    assert (counts["setup_seconds"], counts["data_seconds"], counts["forward_seconds"]) == (12, 0.5, 1)
    assert (counts["useful_tokens"], counts["packed_slots"], counts["saved_prompt_tokens"]) == (160, 180, 10)
    assert (counts["tokens_per_second"], counts["model_tflops"]) == (40, 24 / 4)
    assert (counts["peak_share"], counts["peak_memory_gib"]) == ((0.5 + 3 * 0.25) / 4, 3)


def test_what_no_device_knows_stays_unknown(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(shard("a", 1.0, 100, None)) + "\n")
    assert score_summary(path)["peak_share"] is None


def test_nothing_scored_in_this_attempt(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"setup_seconds": 8.0}\n')
    assert score_summary(path)["score_seconds"] == 8
