"""What happens beside a training step: checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from nemo_spin.megatron.checkpoint import checkpoint_path, latest_checkpoint


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
