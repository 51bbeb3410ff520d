"""Guards at work in the loop: which look at a stage, what is written, and when the loop ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_spin.config.schema import Config
from nemo_spin.data.files import Manifest, write_json
from nemo_spin.errors import GuardError, explain
from nemo_spin.selfplay import guards
from nemo_spin.selfplay.guards import STOP, Finding
from nemo_spin.selfplay.results import iteration_results, read_evaluation
from nemo_spin.selfplay.run_directory import IterationDirectory

if TYPE_CHECKING:
    from nemo_spin.selfplay.stages import Stage


def findings_of(stage: Stage, manifest: Manifest) -> list[Finding]:
    """What the guards see in a finished stage of an iteration."""
    run, iteration = stage.context.run, stage.iteration
    thresholds = stage.context.config.selfplay.guards
    if iteration is None:
        return []
    before = iteration_results(run, iteration - 1) if iteration else None
    if stage.name == "generate":
        earlier = before.generated.get("train", {}) if before and _drawn_as_before(stage) else {}
        return guards.of_answers(manifest.counts.get("train", {}), earlier, thresholds)
    if stage.name == "score":
        return guards.of_scores(manifest.counts, thresholds)
    if stage.name == "train":
        steps = guards.of_steps(read_lines(stage.files.metrics_path), thresholds)
        return [*steps, *guards.of_training(manifest.counts, thresholds)]
    if stage.name == "evaluate":
        first = read_evaluation(run.iteration(0).opponent_evaluation_path)
        return guards.of_evaluation(manifest.counts, before.evaluation if before else first, thresholds)
    return []


def _drawn_as_before(stage: Stage) -> bool:
    """Whether answers are drawn as in the iteration before, so that shares of them can be compared."""
    assert stage.iteration, "there is none before the first"
    how_many = ("spin.num_prompts", "generation.num_generations")
    now, before = (
        {key: value for key, value in entry.settings().items() if key not in how_many}
        for entry in (stage, type(stage)(stage.context, stage.iteration - 1))
    )
    return now == before


def record(stage: Stage, findings: list[Finding]) -> None:
    """Keeps what the guards saw in `guards.json` of the iteration; an older entry is replaced."""
    known = read_findings(stage.files)
    entries = [entry.plain() for entry in findings]
    if known.get(stage.name, []) != entries:
        write_json(stage.files.guards_path, {**known, stage.name: entries})


def read_findings(files: IterationDirectory) -> dict[str, list[dict[str, Any]]]:
    """Stage -> findings, of an iteration; empty where nothing was looked at."""
    try:
        value = json.loads(files.guards_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def error_of(config: Config, label: str, findings: list[Finding]) -> GuardError | None:
    """The error that ends the loop; None where no guard stops it.

    Args:
        config: `selfplay.stop`.
        label: The stage, for the message.
        findings: What its guards saw.
    """
    stopping = [
        entry
        for entry in findings
        if entry.level == STOP and (config.selfplay.stop or entry.guard == "not_finite")
    ]
    if not stopping:
        return None
    first = stopping[0]
    key = f"selfplay.guards.{first.guard}.stop"
    rule, remedy = f"{key}={first.threshold:g}", f", set {key}=null, or selfplay.stop=false to go on"
    if first.guard == "not_finite":
        rule, remedy = "losses and gradients are numbers", ""
    return GuardError(
        explain(
            f"{label}: guard {first.guard}",
            found=first.message,
            rule=rule,
            remedy="change the settings and redo the iteration" + remedy,
        )
    )


def described(finding: Finding) -> str:
    """A finding in one line."""
    return f"guard {finding.guard} ({finding.level}): {finding.message}"


class TrainingWatch:
    """Looks at every optimizer step in the ranks; all of them see the same numbers.

    Args:
        config: Thresholds, and whether guards stop.
        label: The stage, for the message.
        note: Told of what fired.
    """

    def __init__(self, config: Config, label: str, note: Callable[[str], None]) -> None:
        self._config = config
        self._label = label
        self._note = note
        self._guards = guards.StepGuards(config.selfplay.guards)

    def __call__(self, line: dict[str, Any]) -> None:
        """Takes the metrics of a step.

        Raises:
            GuardError: A guard stops the training.
        """
        findings = self._guards.add(line)
        for entry in findings:
            self._note(described(entry))
        error = error_of(self._config, self._label, findings)
        if error is not None:
            raise error


def read_lines(metrics_path: Path) -> list[dict[str, Any]]:
    """The lines of a training's metrics.jsonl; none where it has not begun."""
    try:
        text = metrics_path.read_text(encoding="utf-8")
    except OSError:
        return []
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # cut short
            continue
    return [line for line in lines if isinstance(line, dict)]


def after_failure(stage: Stage) -> None:
    """Records what guards over steps saw of a training that they ended."""
    if stage.name == "train":
        thresholds = stage.context.config.selfplay.guards
        record(stage, guards.of_steps(read_lines(stage.files.metrics_path), thresholds))
