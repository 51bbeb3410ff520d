"""The numbers of an iteration, gathered from what its stages left behind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_spin.data.files import read_manifest
from nemo_spin.errors import NemoSpinError
from nemo_spin.selfplay.run_directory import RunDirectory
from nemo_spin.selfplay.state import read_state, stage_key

STAGES = ("generate", "score", "train", "export", "evaluate")


@dataclass
class IterationResults:
    """What is known of one iteration; empty where a stage is not done.

    Attributes:
        training: The last steps' means and, under `heldout_…`, the held-out metrics.
        generated: The counts of generate.
        scored: The counts of score.
        evaluation: Of theta_{t+1}: `sampled` and `greedy`, each a mapping of numbers.
        seconds: Stage -> how long it took, earlier attempts included.
    """

    training: dict[str, Any] = field(default_factory=dict)
    generated: dict[str, Any] = field(default_factory=dict)
    scored: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def iteration_results(run: RunDirectory, iteration: int) -> IterationResults:
    """The numbers of an iteration."""
    files = run.iteration(iteration)
    return IterationResults(
        training=_counts(files.train),
        generated=_counts(files.generated),
        scored=_counts(files.scored),
        evaluation=read_evaluation(files.evaluation_path),
        seconds=stage_seconds(run, iteration),
    )


def stage_seconds(run: RunDirectory, iteration: int) -> dict[str, float]:
    """Stage -> seconds it took in an iteration."""
    state = read_state(run.state_path)
    entries = {stage: state.stages.get(stage_key(stage, iteration)) for stage in STAGES} if state else {}
    return {
        stage: entry.seconds + entry.earlier_seconds
        for stage, entry in entries.items()
        if entry is not None and entry.seconds is not None
    }


def read_evaluation(path: Path) -> dict[str, Any]:
    """An evaluation's numbers; empty where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def number(values: Mapping[str, Any], *path: str) -> float | None:
    """The number under nested keys; None where there is none."""
    node: Any = values
    for key in path:
        node = node.get(key) if isinstance(node, Mapping) else None
    return float(node) if isinstance(node, (int, float)) and not isinstance(node, bool) else None


def _counts(directory: Path) -> dict[str, Any]:
    try:
        manifest = read_manifest(directory)
    except NemoSpinError:
        return {}
    return manifest.counts if manifest else {}
