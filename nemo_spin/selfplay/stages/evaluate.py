"""evaluate: how a model answers held-out prompts, sampled and greedy, and benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_spin.config.iterations import EVALUATED_AS, config_at
from nemo_spin.config.schema import Config
from nemo_spin.data.files import Manifest, write_json
from nemo_spin.data.progress import Progress
from nemo_spin.evaluate import benchmarks, heldout
from nemo_spin.evaluate.scorer import load_scorer, scorer_sha256
from nemo_spin.generation.environment import sampler_python
from nemo_spin.generation.families import check_sampled
from nemo_spin.selfplay.inputs import config_inputs
from nemo_spin.selfplay.launcher import sampler_place
from nemo_spin.selfplay.results import read_evaluation
from nemo_spin.selfplay.run_directory import IterationDirectory
from nemo_spin.selfplay.stages.engine_notes import describe_engine, write_engine_line
from nemo_spin.selfplay.stages.export import ExportStage
from nemo_spin.selfplay.stages.opponent import served, weights_of
from nemo_spin.selfplay.stages.prepare import PrepareStage
from nemo_spin.selfplay.stages.stage import Stage
from nemo_spin.selfplay.stages.train import TrainStage


class EvaluateStage(Stage):
    """theta_{t+1} after iteration t; theta_0 where there is no iteration."""

    name = "evaluate"
    consumed = False

    @property
    def label(self) -> str:
        """See `Stage`."""
        return "evaluate of theta_0" if self.iteration is None else super().label

    @property
    def config(self) -> Config:
        """The same for every model of the run, so that their scores can be compared."""
        return config_at(self.context.config, EVALUATED_AS)

    @property
    def files(self) -> IterationDirectory:
        """theta_0's evaluation lies beside that of iteration 0."""
        return self.context.run.iteration(self.iteration or 0)

    @property
    def directory(self) -> Path:
        """See `Stage`."""
        return self.files.opponent_evaluation if self.iteration is None else self.files.evaluation

    @property
    def progress_path(self) -> Path:
        """Of its own for theta_0, which shares the logs of iteration 0."""
        of_theta_0 = self.logs / f"{self.name}-theta_0.progress.jsonl"
        return of_theta_0 if self.iteration is None else super().progress_path

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
        """See `Stage`; sampling settings are those of iteration 0, for every model."""
        return config_inputs(self.context.config, self.name, EVALUATED_AS)

    def check(self) -> None:
        """vLLM must have the model and an interpreter, also for benchmarks; the scorer must be importable."""
        config = self.context.config
        check_sampled(self.context.theta_0)
        sampler_python(config)
        if config.evaluation.scorer is not None:
            load_scorer(config.evaluation.scorer)
        benchmarks.check(config)

    def consumes(self) -> dict[str, Any]:
        """The model, the prompts and the scorer."""
        if self.iteration is not None:
            self.required(ExportStage(self.context, self.iteration))
        return {
            "model": weights_of(self.context, self.model_dir),
            "prepared": self.required(PrepareStage(self.context)).sha256(),
            "scorer": scorer_sha256(self.context.config.evaluation.scorer),
            **benchmarks.inputs(self.context.config),
        }

    def leftovers(self) -> list[Path]:
        """See `Stage`."""
        return [self.directory, self.numbers_path]

    def run(self, progress: Progress) -> None:
        """See `Stage`."""
        common: dict[str, Any] = {
            "model_dir": self.model_dir,
            "prepared": self.context.run.data_dir,
            "out_dir": self.directory,
            "iteration": self.iteration or 0,
            "model_sha256": weights_of(self.context, self.model_dir),
            "inputs": self.inputs(),
        }
        log_path = self.progress_path.with_name(self.progress_path.name.replace(".progress.jsonl", ".log"))
        loaded = served(self.context, None if self.iteration is None else self.iteration + 1)
        job = heldout.start(
            self.config,
            progress_path=self.progress_path,
            log_path=log_path,
            canary_path=None if self.iteration is None else self.files.canary_path,
            keeper=self.context.keeper,
            place=sampler_place(self.context.launcher, self.config),
            **{**common, **loaded},
        )
        self.follow(job, progress)
        if self.config.evaluation.benchmarks.tasks:
            self._run_benchmarks(progress)
        manifest = heldout.finish(self.config, notes=job.notes, **common)
        write_engine_line(self.files.metrics_path, manifest, step=self._last_step())

    def _run_benchmarks(self, progress: Progress) -> None:
        """lm-eval has an engine of its own: a waiting one gives its memory back first."""
        self.context.keeper.close()
        name = self.progress_path.name.replace(".progress.jsonl", "-benchmarks")
        progress_path = self.progress_path.with_name(f"{name}.progress.jsonl")
        progress_path.unlink(missing_ok=True)
        job = benchmarks.start(
            self.config,
            model_dir=self.model_dir,
            model_sha256=weights_of(self.context, self.model_dir),
            out_dir=self.directory,
            progress_path=progress_path,
            log_path=self.progress_path.with_name(f"{name}.log"),
            place=sampler_place(self.context.launcher, self.config),
        )
        self.follow(job, progress, progress_path=progress_path)

    def _last_step(self) -> int:
        """Of the training that made the model; -1 where there was none."""
        if self.iteration is None:
            return -1
        return int(self.required(TrainStage(self.context, self.iteration)).counts["steps"]) - 1

    def publish(self, manifest: Manifest) -> None:
        """The numbers lie beside the directory, under the name that other tools look for."""
        if read_evaluation(self.numbers_path) != manifest.counts:
            write_json(self.numbers_path, manifest.counts)

    def describe(self, manifest: Manifest) -> str:
        """See `Stage`."""
        parts = []
        for way in (way for way in (heldout.SAMPLED, heldout.GREEDY) if way in manifest.counts):
            counts = manifest.counts[way]
            score = "" if counts.get("score") is None else f"score {counts['score']:.3f}, "
            parts.append(
                f"{way}: {score}{counts['mean_length']:.1f} tokens on average, {counts['cut_share']:.1%} cut"
            )
        for task, result in manifest.counts.get("benchmarks", {}).items():
            parts.append(f"{task} {result['value']:.1%}")
        return "; ".join(parts) + describe_engine(manifest)
