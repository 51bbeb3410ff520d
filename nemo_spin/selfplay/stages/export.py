"""export and import-hf: between Megatron's checkpoints and Hugging Face directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_spin.data.files import Manifest
from nemo_spin.data.progress import Progress
from nemo_spin.selfplay.stages.opponent import link_opponent, weights_of
from nemo_spin.selfplay.stages.score import describe_counts
from nemo_spin.selfplay.stages.stage import INPUTS_NAME, Stage
from nemo_spin.selfplay.stages.train import SftStage, TrainStage


class ExportStage(Stage):
    """theta_{t+1} as a Hugging Face directory: the next opponent, and what users serve."""

    name = "export"

    @property
    def directory(self) -> Path:
        """See `Stage`."""
        return self.files.model

    @property
    def inputs_path(self) -> Path:
        """Not in the model's directory, which is there only once it is complete."""
        return self.logs / f"{self.name}.{INPUTS_NAME}"

    def prepare_directory(self, inputs: dict[str, Any]) -> None:
        """An export starts anew, so what an earlier attempt was made from does not matter."""
        self.inputs_path.unlink(missing_ok=True)
        super().prepare_directory(inputs)

    def leftovers(self) -> list[Path]:
        """See `Stage`; a canary and an adapter are made along with the model."""
        return [self.directory, self.files.canary_path, self.files.adapter]

    def consumes(self) -> dict[str, Any]:
        """The trained weights."""
        kind = SftStage if self.iteration is None else TrainStage
        return {"trained": self.required(kind(self.context, self.iteration)).sha256()}

    def run(self, progress: Progress) -> None:
        """See `Stage`."""
        self.launch(progress)

    def describe(self, manifest: Manifest) -> str:
        """See `Stage`."""
        size = sum(entry["size"] for entry in manifest.files.values())
        amount = f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
        return f"{amount} in {self.directory}"


class ImportStage(Stage):
    """`model.path` as a Megatron distributed checkpoint."""

    name = "import-hf"
    of_the_loop = False

    @property
    def directory(self) -> Path:
        """See `Stage`."""
        return self.context.run.imported_dir

    def consumes(self) -> dict[str, Any]:
        """The model."""
        return {"model": weights_of(self.context, self.context.theta_0)}

    def run(self, progress: Progress) -> None:
        """See `Stage`."""
        link_opponent(self.context, None)
        self.launch(progress)

    def describe(self, manifest: Manifest) -> str:
        """See `Stage`."""
        return describe_counts(manifest.counts) or str(self.directory)
