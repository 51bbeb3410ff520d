"""train and sft: optimizer steps on Megatron, in ranks of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_spin.config.functions import function_file, names_a_function
from nemo_spin.config.iterations import mixed_iterations
from nemo_spin.data.files import Manifest, sha256_file
from nemo_spin.data.progress import Progress
from nemo_spin.selfplay.stages.opponent import link_opponent, opponent_sha256
from nemo_spin.selfplay.stages.prepare import PrepareStage
from nemo_spin.selfplay.stages.score import ScoreStage
from nemo_spin.selfplay.stages.stage import Stage

_SHOWN = (
    "steps",
    "loss",
    "margin",
    "accuracy",
    "heldout_loss",
    "heldout_margin",
    "heldout_accuracy",
    "tokens_per_second",
)


def _own_loss(loss: str) -> dict[str, str]:
    """The hash of the file that `spin.loss` names; nothing for the losses that have a name."""
    if not names_a_function(loss):
        return {}
    return {"loss": sha256_file(function_file(loss, key="spin.loss"))}


class TrainStage(Stage):
    """From theta_t to theta_{t+1}; goes on from its newest checkpoint."""

    name = "train"
    saves_when_told_to_leave = True

    @property
    def directory(self) -> Path:
        """See `Stage`."""
        return self.files.train

    def consumes(self) -> dict[str, Any]:
        """The starting weights, the scored pairs and the source of a user's own loss."""
        return {
            "opponent": opponent_sha256(self.context, self.iteration),
            "scored": self.required(ScoreStage(self.context, self.iteration)).sha256(),
            **_own_loss(self.context.config.spin.loss),
            **self._carried(),
            **self._base(),
        }

    def _carried(self) -> dict[str, str]:
        """The training whose optimizer state this one starts with; nothing where it starts with none."""
        if not self.context.config.model.optim.carry_over or not self.iteration:
            return {}
        return {"optimizer": self.required(TrainStage(self.context, self.iteration - 1)).sha256()}

    def _base(self) -> dict[str, Any]:
        """Earlier scorings that hold theta_0's log-probabilities; nothing where they are not needed."""
        spin = self.context.config.spin
        earlier = mixed_iterations(spin, self.iteration)[:-1] if spin.opponent_mix and self.iteration else []
        if not earlier:
            return {}
        scorings = {
            f"iter_{number:02d}": self.required(ScoreStage(self.context, number)).sha256()
            for number in earlier
        }
        return {"base": scorings}

    def check(self) -> None:
        """A user's own loss must be one, before anything is sampled for it."""
        loss = self.context.config.spin.loss
        if names_a_function(loss):
            from nemo_spin.objective.user_loss import load_user_loss  # torch: only where there is one

            load_user_loss(loss)

    def leftovers(self) -> list[Path]:
        """See `Stage`."""
        return [self.directory, self.files.metrics_path]

    def run(self, progress: Progress) -> None:
        """See `Stage`."""
        link_opponent(self.context, self.iteration)
        self.launch(progress)

    def describe(self, manifest: Manifest) -> str:
        """See `Stage`."""
        counts = manifest.counts
        return ", ".join(
            f"{counts[name]:,} steps" if name == "steps" else f"{name.replace('_', ' ')} {counts[name]:.4g}"
            for name in _SHOWN
            if name in counts
        )


class SftStage(TrainStage):
    """Plain fine-tuning of theta_0 on the real responses."""

    name = "sft"

    def check(self) -> None:
        """See `Stage`; fine-tuning has no loss to choose."""

    def consumes(self) -> dict[str, Any]:
        """The starting weights and the demonstrations."""
        return {
            "opponent": opponent_sha256(self.context, None),
            "prepared": self.required(PrepareStage(self.context)).sha256(),
        }
