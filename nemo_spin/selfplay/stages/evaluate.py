"""evaluate: how a model answers held-out prompts, sampled and greedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_spin.data.files import Manifest, sha256_file
from nemo_spin.data.progress import Progress
from nemo_spin.selfplay.inputs import config_inputs
from nemo_spin.selfplay.run_directory import IterationDirectory
from nemo_spin.selfplay.stages.export import ExportStage
from nemo_spin.selfplay.stages.opponent import weights_of
from nemo_spin.selfplay.stages.prepare import PrepareStage
from nemo_spin.selfplay.stages.stage import Stage


class EvaluateStage(Stage):
    """theta_{t+1} after iteration t; theta_0 where there is no iteration."""

    name = "evaluate"
    consumed = False

    @property
    def label(self) -> str:
        """See `Stage`."""
        return "evaluate of theta_0" if self.iteration is None else super().label

    @property
    def files(self) -> IterationDirectory:
        """theta_0's evaluation lies beside that of iteration 0."""
        return self.context.run.iteration(self.iteration or 0)

    @property
    def directory(self) -> Path:
        """See `Stage`."""
        return self.files.opponent_evaluation if self.iteration is None else self.files.evaluation

    @property
    def numbers_path(self) -> Path:
        """The numbers, beside `directory`."""
        if self.iteration is None:
            return self.files.opponent_evaluation_path
        return self.files.evaluation_path

    @property
    def model_dir(self) -> Path:
        """The model that is evaluated."""
        return self.context.theta_0 if self.iteration is None else self.files.model

    def settings(self) -> dict[str, Any]:
        """See `Stage`; sampling settings are those of the iteration (theta_0: of the first)."""
        return config_inputs(self.context.config, self.name, self.iteration)

    def consumes(self) -> dict[str, Any]:
        """The model, the prompts, and the scorer if it is a file."""
        if self.iteration is not None:
            self.required(ExportStage(self.context, self.iteration))
        scorer = self.context.config.evaluation.scorer
        source = Path(scorer.rpartition(":")[0]).expanduser() if scorer else None
        return {
            "model": weights_of(self.context, self.model_dir),
            "prepared": self.required(PrepareStage(self.context)).sha256(),
            "scorer": sha256_file(source) if source and source.is_file() else None,
        }

    def leftovers(self) -> list[Path]:
        """See `Stage`."""
        return [self.directory, self.numbers_path]

    def run(self, progress: Progress) -> None:
        """See `Stage`."""
        raise NotImplementedError

    def describe(self, manifest: Manifest) -> str:
        """See `Stage`."""
        return str(manifest.counts)
