"""What happens beside a training step: checkpoints, and leaving when the machine is asked for."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from nemo_spin.megatron.agreement import from_first_rank
from nemo_spin.megatron.checkpoint import CheckpointWriter
from nemo_spin.megatron.checkpoint_files import checkpoint_path, latest_checkpoint
from nemo_spin.model.preemption import Preemption


class SaveCheckpoints(Callback):
    """Saves every `interval` optimizer steps.

    Args:
        directory: Where checkpoints lie.
        interval: Optimizer steps between them; None: none before the end.
        writer: What the trainer's strategy saves with; one in the background is finished here.
        preemption: Asked after every step.

    Attributes:
        left: Where the training was left because the machine was asked for; None: it was not.
    """

    left: str | None = None

    def __init__(
        self, directory: Path, interval: int | None, *, writer: CheckpointWriter, preemption: Preemption
    ) -> None:
        self._directory = directory
        self._interval = interval
        self._writer = writer
        self._preemption = preemption

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Requests to leave count from here on, those that came before too."""
        self._preemption.take_over(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        """All ranks save together; if some rank was told to leave, all stop after this step."""
        self._writer.poll()
        step, steps = trainer.global_step, pl_module.num_steps
        if step == steps:
            return
        leaves = self._preemption.agreed()
        if leaves or (self._interval and step % self._interval == 0):
            trainer.save_checkpoint(checkpoint_path(self._directory, step))
        if leaves:
            self.left = f"saved after step {step} of {steps}; the same command goes on from there"
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # Lightning would evaluate before it stops

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """The last step is always saved."""
        self.save_last(trainer)

    def save_last(self, trainer: Trainer) -> Path:
        """Makes sure the last step has a checkpoint that is complete; returns its path.

        All ranks must call.
        """
        self._writer.wait()
        path = checkpoint_path(self._directory, trainer.global_step)
        if from_first_rank(partial(latest_checkpoint, self._directory)) != path:
            trainer.save_checkpoint(path)
            self._writer.wait()
        return path
