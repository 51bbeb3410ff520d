"""What happens beside a training step: checkpoints, metrics, progress."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from nemo_spin.data.progress import Progress
from nemo_spin.megatron.checkpoint import checkpoint_path, latest_checkpoint
from nemo_spin.model.spin_model import MegatronGPTSPINModel


class SaveCheckpoints(Callback):
    """Saves every `interval` optimizer steps.

    Args:
        directory: Where checkpoints lie.
        interval: Optimizer steps between them; None: none before the end.
    """

    def __init__(self, directory: Path, interval: int | None) -> None:
        self._directory = directory
        self._interval = interval

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        """All ranks save together."""
        step = trainer.global_step
        if self._interval and step % self._interval == 0 and step < pl_module.num_steps:
            trainer.save_checkpoint(checkpoint_path(self._directory, step))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """The last step is always saved."""
        self.save_last(trainer)

    def save_last(self, trainer: Trainer) -> Path:
        """Makes sure the last step has a checkpoint; returns its path."""
        path = checkpoint_path(self._directory, trainer.global_step)
        if latest_checkpoint(self._directory) != path:
            trainer.save_checkpoint(path)
        return path


class MetricsFile(Callback):
    """Appends a JSON line for every optimizer step and every held-out evaluation.

    Lines of steps that a killed process made after its last checkpoint are dropped when
    the training resumes: each step stands in the file once.

    Args:
        path: The file; only the first rank writes.
        progress: Told of every step.
        log_every_n_steps: How often loggers (TensorBoard) are fed.
    """

    def __init__(self, path: Path, progress: Progress, log_every_n_steps: int) -> None:
        self._path = path
        self._progress = progress
        self._every = log_every_n_steps

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Drops what lies at or after the step that comes next."""
        if trainer.is_global_zero and self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) < trainer.global_step]
            self._path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def on_train_batch_end(self, trainer: Trainer, pl_module: MegatronGPTSPINModel, *args: Any) -> None:
        """Writes the step's line."""
        metrics = pl_module.step_metrics()
        self.write(trainer, {"split": "train", **metrics})
        if trainer.logger is not None and trainer.global_step % self._every == 0:
            trainer.logger.log_metrics({f"train/{k}": v for k, v in metrics.items()}, trainer.global_step)
        shown = {key: metrics[key] for key in ("loss", "accuracy") if key in metrics}
        self._progress.update(trainer.global_step, pl_module.num_steps, "step", **shown)

    def on_validation_end(self, trainer: Trainer, pl_module: MegatronGPTSPINModel) -> None:
        """Writes the line of an evaluation in the middle of training."""
        self.write_heldout(trainer, pl_module.last_heldout_metrics)

    def write_heldout(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Writes the line of a held-out evaluation after `global_step` steps."""
        if not metrics:
            return
        self.write(trainer, {"split": "heldout", "step": trainer.global_step - 1, **metrics})
        if trainer.logger is not None:
            trainer.logger.log_metrics({f"heldout/{k}": v for k, v in metrics.items()}, trainer.global_step)

    def write(self, trainer: Trainer, line: dict[str, Any]) -> None:
        """Appends one line, on the first rank."""
        if trainer.is_global_zero:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")


def _step_of(line: str) -> float:
    """The step of a metrics line; infinite for one that was cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")
