"""What one training job is: the values of one iteration, picked out of the configuration."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemo_spin.config.schema import ModelConfig, OptimConfig


@dataclass(frozen=True)
class TrainingJob:
    """One training of a policy, from its opponent's weights to the last optimizer step.

    Attributes:
        opponent: Hugging Face directory the policy starts as.
        rows: Directory of scored pairs, or of prepared demonstrations for plain fine-tuning; None: a
            restored model that is not trained on.
        objective: `spin`, or `sft` for plain cross-entropy on real responses.
        spin: What `nemo_spin.objective.objective.build_objective` takes; empty for plain fine-tuning.
        lr, epochs: Peak learning rate; passes over the rows.
        max_steps: Optimizer steps to stop after; None: all of the epochs.
        seed, iteration: Decide the order of rows.
        model: Parallel sizes, batch sizes, optimizer.
        precision: `32` or `bf16`.
        ln2_tolerance: Of the ln 2 gate; None: no gate.
        directory: Where checkpoints and loggers write.
        metrics_path: JSON lines, one per optimizer step.
        save_interval: Optimizer steps between checkpoints; None: only the last.
        save_top_k: How many of the newest checkpoints stay.
        async_save: Whether training goes on while a checkpoint is written.
        carried: Checkpoint of the iteration before, whose optimizer state this one starts with;
            None: with none.
        val_check_interval: Optimizer steps between held-out evaluations; None: only at the end.
        log_every_n_steps: How often loggers are fed.
        exp_manager: Loggers, for NeMo's exp_manager.
        nemo_path: The .nemo file to write at the end; None: none.
        base: Directories that hold the rows with theta_0 as their opponent, for a mixed one; empty
            where it is not mixed, or is theta_0 itself.
    """

    opponent: Path
    rows: Path | None
    objective: str
    spin: dict[str, Any]
    lr: float
    epochs: int
    max_steps: int | None
    seed: int
    iteration: int
    model: ModelConfig
    precision: str
    ln2_tolerance: float | None
    directory: Path
    metrics_path: Path
    save_interval: int | None
    save_top_k: int
    async_save: bool
    carried: Path | None
    val_check_interval: int | None
    log_every_n_steps: int
    exp_manager: dict[str, Any] = field(default_factory=dict)
    nemo_path: Path | None = None
    base: tuple[str, ...] = ()

    @property
    def optim(self) -> OptimConfig:
        """The optimizer's settings."""
        return self.model.optim

    @property
    def checkpoint_directory(self) -> Path:
        """Where resume checkpoints lie."""
        return self.directory / "checkpoints"

    def as_plain(self) -> dict[str, Any]:
        """Containers of plain values, as NeMo's model configuration wants them."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
