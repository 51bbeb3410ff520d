"""The stages of self-play, one file each, and the order they run in."""

from __future__ import annotations

from nemo_spin.errors import ConfigError, explain
from nemo_spin.selfplay.stages.evaluate import EvaluateStage
from nemo_spin.selfplay.stages.export import ExportStage, ImportStage
from nemo_spin.selfplay.stages.export_checkpoint import ExportCheckpointStage
from nemo_spin.selfplay.stages.generate import GenerateStage
from nemo_spin.selfplay.stages.prepare import PrepareStage
from nemo_spin.selfplay.stages.score import ScoreStage
from nemo_spin.selfplay.stages.stage import Context, Stage
from nemo_spin.selfplay.stages.train import SftStage, TrainStage

__all__ = ["Context", "Stage", "sft_stages", "spin_stages", "stage_of_command"]


def spin_stages(context: Context) -> list[Stage]:
    """Everything that `nemo-spin run` does, in order."""
    evaluation = context.config.evaluation
    has_questions = context.config.data.heldout is not None or bool(evaluation.benchmarks.tasks)
    evaluates = evaluation.enabled and has_questions
    stages: list[Stage] = [PrepareStage(context)]
    if evaluates:
        stages.append(EvaluateStage(context))
    for iteration in range(context.config.spin.iterations):
        stages += [
            GenerateStage(context, iteration),
            ScoreStage(context, iteration),
            TrainStage(context, iteration),
            ExportStage(context, iteration),
        ]
        if evaluates:
            stages.append(EvaluateStage(context, iteration))
    return stages


def sft_stages(context: Context) -> list[Stage]:
    """Everything that `nemo-spin sft` does, in order."""
    return [PrepareStage(context, generates=False), SftStage(context), ExportStage(context)]


def stage_of_command(context: Context, name: str, iteration: int | None) -> Stage:
    """The stage that `nemo-spin NAME` runs.

    Args:
        context: See `Context`.
        name: Of the stage.
        iteration: The iteration asked for; None: the first in which it is not done (or the
            last, where all are).

    Raises:
        ConfigError: There is no such iteration.
    """
    if name == ImportStage.name:
        return ImportStage(context)
    if name == ExportStage.name and context.config.export.checkpoint is not None:
        return ExportCheckpointStage(context)
    iterations = context.config.spin.iterations
    if iteration is not None and iteration >= iterations:
        raise ConfigError(
            explain(
                "--iteration",
                found=iteration,
                rule=f"iterations are counted from 0, and spin.iterations is {iterations}",
                remedy=f"give a number up to {iterations - 1}, or raise spin.iterations",
            )
        )
    candidates = [stage for stage in spin_stages(context) if stage.name == name]
    if not candidates:
        raise ConfigError(
            explain(
                f"nemo-spin {name}",
                found="evaluation.enabled is false, or there are no held-out prompts and no benchmarks",
                rule="held-out prompts are evaluated",
                remedy="set data.heldout and evaluation.enabled=true",
            )
        )
    if iteration is not None:
        return next(stage for stage in candidates if stage.iteration == iteration)
    return next((stage for stage in candidates if stage.manifest() is None), candidates[-1])
