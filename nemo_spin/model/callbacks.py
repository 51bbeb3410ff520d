"""What happens beside a training step: checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from nemo_spin.megatron.checkpoint import CheckpointWriter
from nemo_spin.megatron.checkpoint_files import checkpoint_path, latest_checkpoint


class SaveCheckpoints(Callback):
    """Saves every `interval` optimizer steps.

    Args:
        directory: Where checkpoints lie.
        interval: Optimizer steps between them; None: none before the end.
        writer: What the trainer's strategy saves with; one in the background is finished here.
    """

    def __init__(self, directory: Path, interval: int | None, writer: CheckpointWriter) -> None:
        self._directory = directory
        self._interval = interval
        self._writer = writer

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        """All ranks save together."""
        self._writer.poll()
        step = trainer.global_step
        if self._interval and step % self._interval == 0 and step < pl_module.num_steps:
            trainer.save_checkpoint(checkpoint_path(self._directory, step))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """The last step is always saved."""
        self.save_last(trainer)

    def save_last(self, trainer: Trainer) -> Path:
        """Makes sure the last step has a checkpoint that is complete; returns its path."""
        self._writer.wait()
        path = checkpoint_path(self._directory, trainer.global_step)
        if latest_checkpoint(self._directory) != path:
            trainer.save_checkpoint(path)
            self._writer.wait()
        return path
