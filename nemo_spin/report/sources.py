"""What a report is made from: the files of runs, named by whoever knows where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


class IterationPaths(Protocol):
    """Paths of one iteration; nothing needs to exist. `selfplay.run_directory` has such objects."""

    @property
    def opponent(self) -> Path:
        """Hugging Face directory of theta_t."""

    @property
    def generated(self) -> Path:
        """The opponent's answers."""

    @property
    def scored(self) -> Path:
        """Answers and demonstrations with the opponent's log-probabilities."""

    @property
    def train(self) -> Path:
        """What the training left; its manifest is read."""

    @property
    def model(self) -> Path:
        """Hugging Face directory of theta_{t+1}."""

    @property
    def evaluation(self) -> Path:
        """theta_{t+1}'s answers to held-out prompts."""

    @property
    def opponent_evaluation(self) -> Path:
        """theta_0's answers to held-out prompts (iteration 0 only)."""

    @property
    def evaluation_path(self) -> Path:
        """The numbers of `evaluation`."""

    @property
    def opponent_evaluation_path(self) -> Path:
        """The numbers of `opponent_evaluation`."""

    @property
    def metrics_path(self) -> Path:
        """JSON lines of the training."""

    @property
    def guards_path(self) -> Path:
        """Stage -> the guards that fired."""


@dataclass(frozen=True)
class StageTime:
    """How long a stage took.

    Attributes:
        seconds: All attempts together.
        attempts: How often it was started.
    """

    seconds: float
    attempts: int = 1


@dataclass(frozen=True)
class PartSource:
    """One iteration of self-play, or a plain fine-tuning.

    Attributes:
        iteration: From 0; None for a plain fine-tuning.
        paths: Its files.
        times: Stage -> how long it took.
    """

    iteration: int | None
    paths: IterationPaths
    times: Mapping[str, StageTime] = field(default_factory=dict)


@dataclass(frozen=True)
class RunSource:
    """One run.

    Attributes:
        path: The run directory.
        config_path: Its resolved configuration.
        data_dir: The prepared demonstrations.
        parts: Its iterations, in order.
        status: What it is doing, in a word or two.
        host: The machine that its command was started on; empty where it is not known.
        times: The same as of `PartSource`, for stages that belong to no iteration.
    """

    path: Path
    config_path: Path
    data_dir: Path
    parts: tuple[PartSource, ...]
    status: str = ""
    host: str = ""
    times: Mapping[str, StageTime] = field(default_factory=dict)
