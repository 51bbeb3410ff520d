"""generate: the opponent answers the training prompts (and the held-out ones)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_spin.data.files import Manifest
from nemo_spin.data.progress import Progress
from nemo_spin.selfplay.stages.opponent import opponent_sha256
from nemo_spin.selfplay.stages.prepare import PrepareStage
from nemo_spin.selfplay.stages.stage import Stage


class GenerateStage(Stage):
    """Runs the sampler in an environment of its own; goes on from the shards that are whole."""

    name = "generate"

    @property
    def directory(self) -> Path:
        """See `Stage`."""
        return self.files.generated

    def consumes(self) -> dict[str, Any]:
        """The opponent and the prompts."""
        from nemo_spin.selfplay.stages.export import ExportStage

        if self.iteration:
            self.required(ExportStage(self.context, self.iteration - 1))
        return {
            "opponent": opponent_sha256(self.context, self.iteration),
            "prepared": self.required(PrepareStage(self.context)).sha256(),
        }

    def run(self, progress: Progress) -> None:
        """See `Stage`."""
        raise NotImplementedError

    def describe(self, manifest: Manifest) -> str:
        """See `Stage`."""
        return str(manifest.counts)
