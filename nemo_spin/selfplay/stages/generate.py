"""generate: the opponent answers the training prompts (and the held-out ones)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_spin.data.files import Manifest
from nemo_spin.data.progress import Progress
from nemo_spin.generation.environment import sampler_python
from nemo_spin.generation.families import check_sampled
from nemo_spin.generation.given import write_given
from nemo_spin.generation.stage import finish, generate
from nemo_spin.selfplay.launcher import sampler_place
from nemo_spin.selfplay.stages.engine_notes import describe_engine, write_engine_line
from nemo_spin.selfplay.stages.opponent import (
    link_opponent,
    opponent_canary,
    opponent_sha256,
    served,
)
from nemo_spin.selfplay.stages.prepare import PrepareStage
from nemo_spin.selfplay.stages.stage import Stage


class GenerateStage(Stage):
    """Runs the sampler in an environment of its own; goes on from the shards that are whole."""

    name = "generate"

    @property
    def directory(self) -> Path:
        """See `Stage`."""
        return self.files.generated

    @property
    def is_given(self) -> bool:
        """Whether the answers came with the demonstrations."""
        return self.config.data.use_generations and not self.iteration

    def check(self) -> None:
        """vLLM must have the model and an interpreter, where there is something to sample."""
        if not self.is_given:
            check_sampled(self.context.theta_0)
            sampler_python(self.context.config)

    def settings(self) -> dict[str, Any]:
        """See `Stage`; how answers are sampled does not matter where they are given."""
        settings = super().settings()
        if not self.is_given:
            return settings
        return {"spin.num_prompts": settings["spin.num_prompts"], "seed": settings["seed"]}

    def consumes(self) -> dict[str, Any]:
        """The opponent and the prompts."""
        from nemo_spin.selfplay.stages.export import ExportStage  # which follows from this stage

        if self.iteration:
            self.required(ExportStage(self.context, self.iteration - 1))
        return {
            "opponent": opponent_sha256(self.context, self.iteration),
            "prepared": self.required(PrepareStage(self.context)).sha256(),
        }

    def run(self, progress: Progress) -> None:
        """See `Stage`."""
        assert self.iteration is not None, "generate belongs to an iteration"
        link_opponent(self.context, self.iteration)
        common: dict[str, Any] = {
            "prepared": self.context.run.data_dir,
            "out_dir": self.directory,
            "iteration": self.iteration,
            "opponent_sha256": opponent_sha256(self.context, self.iteration),
            "inputs": self.inputs(),
        }
        if self.is_given:
            write_given(self.config, **common)
            return
        job = generate(
            self.config,
            progress_path=self.progress_path,
            log_path=self.logs / f"{self.name}.log",
            canary_path=opponent_canary(self.context, self.iteration),
            keeper=self.context.keeper,
            place=sampler_place(self.context.launcher, self.config),
            **served(self.context, self.iteration),
            **common,
        )
        self.follow(job, progress)
        manifest = finish(self.config, notes=job.notes, **common)
        write_engine_line(self.files.metrics_path, manifest, step=-1)

    def describe(self, manifest: Manifest) -> str:
        """See `Stage`."""
        answers = "; ".join(
            f"{split}: {describe_answers(manifest.counts[split])}"
            for split in ("train", "heldout")
            if split in manifest.counts
        )
        return answers + describe_engine(manifest)


def describe_answers(counts: Mapping[str, Any]) -> str:
    """Answers in a few words, by the counts of `generation.counts`."""
    return (
        f"{counts['rows']:,} answers, {counts['mean_length']:.1f} tokens on average "
        f"(real: {counts['real_mean_length']:.1f}), {counts['cut_share']:.1%} cut, "
        f"{counts['equal_share']:.1%} as demonstrated"
    )
