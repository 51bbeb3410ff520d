"""What the loop asks of whoever starts the ranks of a stage.

`nemo_spin.launch` implements it (processes of this machine, steps of a Slurm job, ranks that
someone else starts); the loop knows this protocol alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from nemo_spin.config.schema import Config
from nemo_spin.generation.placement import Place


@dataclass(frozen=True)
class Job:
    """One stage's processes: the same module in every rank.

    Attributes:
        name: For logs and messages, such as "train iteration 0".
        module: Run as `python -m module *arguments` in every rank.
        arguments: Command-line arguments, the same for every rank.
        ranks: Processes in all (`trainer.devices * trainer.num_nodes`).
        log_dir: One log file per rank goes there.
        progress_path: Exported as NEMO_SPIN_PROGRESS; rank 0 appends its events there
            (`nemo_spin.data.progress`).
        omp_num_threads: CPU threads per rank.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    ranks: int
    log_dir: Path
    progress_path: Path
    omp_num_threads: int


class RunningJob(Protocol):
    """A job that was started."""

    def poll(self) -> int | None:
        """The exit code once all ranks ended, None before. It does not wait."""

    def stop(self) -> None:
        """Ends the whole process group, within seconds. Harmless when it has ended."""

    def describe_failure(self) -> str:
        """The last lines of the first failing rank's log, and that log's path."""


class RankJob(RunningJob, Protocol):
    """A job of ranks, which know what to do when the machine is asked for."""

    def interrupt(self) -> None:
        """Asks all ranks to save and to end with `nemo_spin.errors.PREEMPTED`; does not wait."""


class Launcher(Protocol):
    """Starts jobs."""

    def start(self, job: Job) -> RankJob:
        """Starts all ranks of `job` and returns at once."""


@runtime_checkable
class PlacesSamplers(Protocol):
    """A launcher with more than this machine says where each of several samplers runs."""

    def place_samplers(self, *, replicas: int, tensor_parallel_size: int) -> Place:
        """A place for each sampler, with as many devices of one machine.

        Args:
            replicas: `generation.replicas`.
            tensor_parallel_size: Devices of each.

        Raises:
            ConfigError: There is not enough room for all.
        """


def sampler_place(launcher: Launcher, config: Config) -> Place | None:
    """Where samplers run; None: on this machine."""
    if not isinstance(launcher, PlacesSamplers):
        return None
    generation = config.generation
    return launcher.place_samplers(
        replicas=generation.replicas, tensor_parallel_size=generation.tensor_parallel_size
    )
