"""What all stages have in common."""

from __future__ import annotations

import abc
import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from nemo_spin.config.iterations import config_at
from nemo_spin.config.schema import Config
from nemo_spin.data.files import Manifest, remove_partials, write_json
from nemo_spin.data.progress import Progress
from nemo_spin.errors import CheckpointError, ConfigError, GenerationError, StageError, explain
from nemo_spin.generation.keeper import EngineKeeper
from nemo_spin.selfplay.following import follow
from nemo_spin.selfplay.inputs import config_inputs, plain
from nemo_spin.selfplay.launcher import Job, Launcher, RunningJob
from nemo_spin.selfplay.run_directory import IterationDirectory, RunDirectory
from nemo_spin.selfplay.storage import full_disk_error
from nemo_spin.selfplay.verified import Verified
from nemo_spin.selfplay.watchdog import Watchdog

WORKER = "nemo_spin.selfplay.worker"
INPUTS_NAME = "inputs.json"


@dataclass(frozen=True)
class Context:
    """What stages are given.

    Attributes:
        config: The resolved configuration.
        run: Where everything lies.
        launcher: Starts ranks.
        verified: Manifests, each verified once per command.
        theta_0: Local Hugging Face directory of `model.path`.
        keeper: Holds the sampler's engine between stages.
    """

    config: Config
    run: RunDirectory
    launcher: Launcher
    verified: Verified
    theta_0: Path
    keeper: EngineKeeper = field(default_factory=EngineKeeper)


class Stage(abc.ABC):
    """One stage of one iteration: what it depends on, how it is done, what it has to show.

    It is done exactly if `directory` holds a manifest whose files are as listed; the
    manifest's `inputs` say what it was made from.

    Args:
        context: See `Context`.
        iteration: Counted from 0; None for stages that belong to none.
    """

    name: ClassVar[str]
    # Whether later stages consume the result (so that changing it means redoing them).
    consumed: ClassVar[bool] = True
    # Whether `nemo-spin run` runs it.
    of_the_loop: ClassVar[bool] = True
    # Whether its ranks save what they have when they are told to leave.
    saves_when_told_to_leave: ClassVar[bool] = False
    # What the names under `config` in the inputs lack.
    key_prefix: ClassVar[str] = ""

    def __init__(self, context: Context, iteration: int | None = None) -> None:
        self.context = context
        self.iteration = iteration

    @property
    def label(self) -> str:
        """The stage for people, such as "train of iteration 0"."""
        return self.name if self.iteration is None else f"{self.name} of iteration {self.iteration}"

    @property
    def config(self) -> Config:
        """The configuration, as it is in this iteration."""
        return config_at(self.context.config, self.iteration)

    @property
    def files(self) -> IterationDirectory:
        """The directory of the iteration (or of the plain fine-tuning)."""
        return self.context.run.at(self.iteration)

    @property
    @abc.abstractmethod
    def directory(self) -> Path:
        """Where the result and its manifest lie."""

    @property
    def logs(self) -> Path:
        """Where logs and progress go."""
        return self.files.logs

    @property
    def inputs_path(self) -> Path:
        """What an unfinished result is being made from, so that nothing else goes on with it."""
        return self.directory / INPUTS_NAME

    @property
    def progress_path(self) -> Path:
        """Where the stage's processes report."""
        return self.logs / f"{self.name}.progress.jsonl"

    def settings(self) -> dict[str, Any]:
        """The configuration keys that matter to the result, and their values."""
        return config_inputs(self.context.config, self.name, self.iteration)

    @abc.abstractmethod
    def consumes(self) -> dict[str, Any]:
        """Hashes of what other stages (or the user) left for this one. They must be done."""

    def inputs(self) -> dict[str, Any]:
        """Everything the result depends on, as it stands in the manifest."""
        return dict(plain({"config": self.settings(), **self.consumes()}))

    def leftovers(self) -> list[Path]:
        """Everything to remove so that the stage is done again."""
        return [self.directory]

    @abc.abstractmethod
    def run(self, progress: Progress) -> None:
        """Makes the result, or goes on making it; writes the manifest last."""

    @abc.abstractmethod
    def describe(self, manifest: Manifest) -> str:
        """The result in one line."""

    def manifest(self) -> Manifest | None:
        """The verified manifest; None where the stage is not done."""
        return self.context.verified.manifest(self.directory)

    def saved(self) -> frozenset[str]:
        """Names of what is there to go on from, should the stage be cut short: whole shards and checkpoints.

        Nothing where the file system does not answer.
        """
        with contextlib.suppress(OSError):
            patterns = ("**/*shard-*.parquet", f"checkpoints/step-{'[0-9]' * 8}")
            return frozenset(str(path) for pattern in patterns for path in self.directory.glob(pattern))
        return frozenset()

    def prepare_directory(self, inputs: dict[str, Any]) -> None:
        """Makes room: removes what killed writers left, and says what the result is made from.

        An unfinished result that does not say what it was made from is removed.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        self.progress_path.unlink(missing_ok=True)
        remove_partials(self.directory.parent)
        if self.directory.exists() and not self.inputs_path.exists():
            shutil.rmtree(self.directory)
        write_json(self.inputs_path, inputs)

    def check(self) -> None:  # noqa: B027  (most stages have nothing to look for)
        """Looks for what can be known to be wrong long before the stage's turn.

        Raises:
            NemoSpinError: Something is.
        """

    def publish(self, manifest: Manifest) -> None:  # noqa: B027  (most have nothing outside)
        """Sees to it that what lies outside of `directory` is there too, once the stage is done."""

    def launch(self, progress: Progress) -> None:
        """Runs `selfplay.worker` on this stage in all ranks, to its end.

        Raises:
            NemoSpinError: What the ranks reported, or that they failed.
        """
        arguments = [self.name, "--run-dir", str(self.context.run.path)]
        if self.iteration is not None:
            arguments += ["--iteration", str(self.iteration)]
        arguments += ["--inputs", str(self.inputs_path)]
        config = self.context.config
        ranks = config.trainer.devices * config.trainer.num_nodes
        job = Job(
            name=self.label,
            module=WORKER,
            arguments=tuple(arguments),
            ranks=ranks,
            log_dir=self.logs,
            progress_path=self.progress_path,
            omp_num_threads=config.launcher.omp_num_threads or max(1, num_cores() // config.trainer.devices),
        )
        self.context.keeper.make_room()
        watchdog = Watchdog(
            self.label,
            progress_path=self.progress_path,
            ranks=ranks,
            silent_s=config.launcher.hang_timeout_s,
        )
        started = self.context.launcher.start(job)
        leave = started.interrupt if self.saves_when_told_to_leave else None
        self.follow(started, progress, interrupt=leave, watchdog=watchdog)

    def follow(
        self,
        job: RunningJob,
        progress: Progress,
        *,
        interrupt: Callable[[], None] | None = None,
        progress_path: Path | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        """Waits for the stage's processes.

        Args:
            job: Them.
            progress: Gets what they report.
            interrupt: Asks them to save and end; None where they have nothing to save.
            progress_path: Where they report it; None: where the stage's processes do.
            watchdog: Looks for ranks that hang; None: nobody does.

        Raises:
            NemoSpinError: They failed.
        """
        try:
            follow(
                job,
                name=self.label,
                progress_path=progress_path or self.progress_path,
                progress=progress,
                timeout_s=self.context.config.launcher.timeout_s,
                interrupt=interrupt,
                grace_s=self.context.config.launcher.preemption_grace_s,
                watchdog=watchdog,
            )
        except (StageError, GenerationError, CheckpointError) as error:
            full = full_disk_error(self.context.run.path, str(error))
            if full is not None:
                raise full from error
            raise

    def required(self, stage: Stage) -> Manifest:
        """The manifest of a stage that this one consumes.

        Raises:
            ConfigError: It has not been run.
        """
        manifest = stage.manifest()
        if manifest is None:
            raise ConfigError(
                explain(
                    f"{self.label} in {self.context.run.path}",
                    found=f"{stage.label} has not been done ({stage.directory})",
                    rule=f"{self.name} needs the result of {stage.name}",
                    remedy=f"run `nemo-spin {stage.name}` with the same configuration first, "
                    "or `nemo-spin run`, which does everything in order",
                )
            )
        return manifest


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
