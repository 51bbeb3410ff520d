"""What every rank of every stage starts from."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nemo_spin.bridge.families import architecture_of
from nemo_spin.config.schema import Config
from nemo_spin.data.progress import Progress
from nemo_spin.megatron.architecture import Architecture
from nemo_spin.megatron.engine import Engine, layout_of
from nemo_spin.megatron.provider import build_model
from nemo_spin.megatron.runtime import Runtime
from nemo_spin.selfplay.heartbeat import Heartbeat
from nemo_spin.selfplay.run_directory import IterationDirectory, RunDirectory

_DTYPES = {"32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class StageContext:
    """One rank's view of the stage it works on.

    Attributes:
        config: The run's resolved configuration.
        run: The run directory.
        iteration: Iteration of self-play; None for plain fine-tuning and imports.
        runtime: This rank's place; process groups are joined.
        progress: Followed by the command on the user's terminal; silent on other ranks.
        inputs: What the parent says the stage's result depends on, for its manifest.
        started: `time.monotonic()` when this process began.
        heartbeat: Shows in which phase this rank is; None: nobody looks.
    """

    config: Config
    run: RunDirectory
    iteration: int | None
    runtime: Runtime
    progress: Progress
    inputs: dict[str, Any]
    started: float = field(default_factory=time.monotonic)
    heartbeat: Heartbeat | None = None

    def phase(self, name: str) -> None:
        """A part of the stage begins. All ranks must call, and leave together.

        Raises:
            StageError: Some ranks did not come in time.
        """
        if self.heartbeat is not None:
            self.heartbeat.phase(name)
        if self.runtime.phases is not None:
            self.runtime.phases.enter(name)

    @property
    def here(self) -> IterationDirectory:
        """Where the stage's files lie."""
        return self.run.at(self.iteration)

    @property
    def precision(self) -> str:
        """`32` or `bf16`: `trainer.precision`, resolved for this machine."""
        configured = self.config.trainer.precision
        if configured != "auto":
            return configured
        return "bf16" if torch.cuda.is_available() else "32"

    @property
    def agreement(self) -> str:
        """What decides how closely a sampler can agree with Megatron: `fp8`, or `precision`."""
        return "fp8" if self.config.model.fp8 else self.precision

    def build_engine(
        self, model_dir: Path, load: Callable[[list[Any], Architecture], None] | None = None
    ) -> tuple[Engine, Architecture]:
        """This rank's share of the model of `model_dir`, without optimizer. All ranks must call.

        Args:
            model_dir: Hugging Face directory that names the architecture.
            load: Fills the chunks; None leaves them to a checkpoint that is loaded next.
        """
        architecture = architecture_of(model_dir)
        chunks = build_model(architecture, self.config.model, params_dtype=_DTYPES[self.precision])
        if load is not None:
            load(chunks, architecture)
        engine = Engine(chunks, self.runtime, architecture.vocab_size, layout_of(self.config.model))
        return engine, architecture
