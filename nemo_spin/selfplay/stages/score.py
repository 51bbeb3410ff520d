"""score: the opponent's log-probabilities of both responses of every pair."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_spin.config.iterations import mixed_iterations
from nemo_spin.data.files import Manifest
from nemo_spin.data.progress import Progress
from nemo_spin.selfplay.stages.generate import GenerateStage
from nemo_spin.selfplay.stages.opponent import link_opponent, opponent_sha256
from nemo_spin.selfplay.stages.stage import Stage

_SHOWN = ("pairs", "sampler_difference", "tokens_per_second")


class ScoreStage(Stage):
    """A forward pass of theta_t over the generations of this and earlier iterations."""

    name = "score"

    @property
    def directory(self) -> Path:
        """See `Stage`."""
        return self.files.scored

    @property
    def _iteration(self) -> int:
        assert self.iteration is not None, "score belongs to an iteration"
        return self.iteration

    def mixed_iterations(self) -> list[int]:
        """The iterations whose generations are scored: this one and `spin.history` before it."""
        return mixed_iterations(self.context.config.spin, self._iteration)

    def settings(self) -> dict[str, Any]:
        """Of `spin.history` only what there is to mix: raising it changes nothing at iteration 0."""
        ages, mixture = len(self.mixed_iterations()), self.context.config.spin.mixture
        settings = super().settings() | {"spin.history": ages - 1}
        if mixture is None:
            return settings
        return settings | {"spin.mixture": mixture[:ages], "seed": self.context.config.seed}

    def consumes(self) -> dict[str, Any]:
        """The opponent, theta_0 where it is mixed in, and all generations."""
        mixed = bool(self.context.config.spin.opponent_mix and self._iteration)
        return {
            **({"theta_0": opponent_sha256(self.context, 0)} if mixed else {}),
            "opponent": opponent_sha256(self.context, self.iteration),
            "generated": {
                f"iter_{number:02d}": self.required(GenerateStage(self.context, number)).sha256()
                for number in self.mixed_iterations()
            },
        }

    def run(self, progress: Progress) -> None:
        """See `Stage`."""
        link_opponent(self.context, self.iteration)
        self.launch(progress)

    def describe(self, manifest: Manifest) -> str:
        """See `Stage`."""
        return describe_counts({name: manifest.counts.get(name) for name in _SHOWN})


def describe_counts(counts: Mapping[str, Any]) -> str:
    """The plain numbers of a manifest's counts, as `name value`."""
    numbers = {
        name.replace("_", " "): value
        for name, value in counts.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    return ", ".join(
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4g}"
        for name, value in numbers.items()
    )
