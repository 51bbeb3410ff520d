"""The numbers of a finished training worth a line, from its metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_MEANS = (
    "loss",
    "margin",
    "accuracy",
    "real_rewards",
    "generated_rewards",
    "policy_real_logps",
    "policy_generated_logps",
    "opponent_real_logps",
    "opponent_generated_logps",
    "policy_real_logps_per_token",
    "policy_generated_logps_per_token",
    "grad_norm",
)
_SECONDS = ("setup", "data", "forward_backward", "optimizer", "checkpoint", "evaluation", "logging")
_RATES = ("model_tflops", "peak_share")

Lines = list[dict[str, Any]]


def summary(metrics_path: Path) -> dict[str, float | None]:
    """What a training came to.

    Returns:
        `steps`, `first_loss`, `identical_pairs` that were dropped; means of the last tenth of
        steps (at least one) under their own names, and the last held-out evaluation's under
        `heldout_`; and how fast it was (`_speed`).
    """
    lines = [json.loads(line) for line in metrics_path.read_text(encoding="utf-8").splitlines()]
    steps, heldout = _split(lines, "train"), _split(lines, "heldout")
    result: dict[str, float | None] = {"steps": len(steps)}
    starts = [line for line in _split(lines, "start") if "identical_pairs" in line]
    if starts:
        result["identical_pairs"] = starts[-1]["identical_pairs"]
    if steps:
        result["first_loss"] = steps[0]["loss"]
        last = steps[-max(1, len(steps) // 10) :]
        result.update({name: _sum(last, name) / len(last) for name in _MEANS if name in last[0]})
        result.update(_speed(lines))
    if heldout:
        result.update({f"heldout_{name}": heldout[-1][name] for name in _MEANS if name in heldout[-1]})
    return result


def _speed(lines: Lines) -> dict[str, float | None]:
    """Over all steps, with everything that came between, before and after them.

    Returns:
        `pairs` that were trained on and the `train_seconds` it took from the start of the process;
        what became of them, by phase; rates as `megatron.throughput` defines them, over the time
        of the steps.
    """
    steps = _split(lines, "train")
    stepping = _sum(steps, "step_seconds")
    useful, slots = _sum(steps, "useful_tokens"), _sum(steps, "packed_slots")
    mean_rates = {
        name: sum(line[name] * line["step_seconds"] for line in steps) / stepping
        if steps[0][name] is not None
        else None
        for name in _RATES
    }
    return {
        "pairs": _sum(steps, "pairs"),
        "train_seconds": _sum(lines, "setup_seconds") + _sum(lines, "step_seconds"),
        **{f"{name}_seconds": _sum(lines, f"{name}_seconds") for name in _SECONDS},
        "useful_tokens": useful,
        "packed_slots": slots,
        "useful_share": useful / slots,
        "saved_prompt_tokens": _sum(steps, "saved_prompt_tokens"),
        "tokens_per_second": useful / stepping,
        **mean_rates,
        "peak_memory_gib": max(line["peak_memory_gib"] for line in lines if "peak_memory_gib" in line),
    }


def _split(lines: Lines, split: str) -> Lines:
    return [line for line in lines if line["split"] == split]


def _sum(lines: Lines, name: str) -> float:
    return float(sum(line.get(name, 0.0) for line in lines))
