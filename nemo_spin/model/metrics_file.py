"""The lines of metrics.jsonl, and what loggers and the progress bar are told of each step."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from nemo_spin.data.files import sync_directory, sync_file, write_text
from nemo_spin.data.progress import Progress
from nemo_spin.model.spin_model import MegatronGPTSPINModel

Columns = Mapping[str, float | None]
Watch = Callable[[dict[str, Any]], None]


class MetricsFile(Callback):
    """Appends a JSON line for every optimizer step and every held-out evaluation.

    Two more lines say where the rest of the time went: `start`, and `end` with what came after the
    last step. Lines of steps that a killed process made after its last checkpoint are dropped when
    the training resumes, and those before it are durable when the checkpoint is (`sync`): each step
    stands in the file once.

    Args:
        path: The file; only the first rank writes.
        progress: Told of every step.
        log_every_n_steps: How often loggers (TensorBoard, W&B) are fed.
        started: `time.monotonic()` when the process began to prepare the training.
        watch: Given every step's line, once it is written; what it raises ends the training.
    """

    def __init__(
        self,
        path: Path,
        progress: Progress,
        *,
        log_every_n_steps: int,
        started: float,
        watch: Watch | None = None,
    ) -> None:
        self._path = path
        self._progress = progress
        self._every = log_every_n_steps
        self._started = started
        self._watch = watch

    def on_train_start(self, trainer: Trainer, pl_module: MegatronGPTSPINModel) -> None:
        """Begins with the step that comes next."""
        self._drop_later(trainer)
        pl_module.restart_clock()
        seconds = time.monotonic() - self._started
        self._write(
            trainer,
            {
                "split": "start",
                "step": trainer.global_step - 1,
                "setup_seconds": seconds,
                "identical_pairs": pl_module.identical_pairs,
            },
        )

    def on_train_batch_end(self, trainer: Trainer, pl_module: MegatronGPTSPINModel, *args: Any) -> None:
        """Writes the step's line. All ranks call: the line says what passed on each of them."""
        metrics = pl_module.step_metrics()
        with pl_module.meter.phase("logging"):
            self._write(trainer, {"split": "train", **metrics})
            if trainer.global_step % self._every == 0:
                _log(trainer, "train", metrics)
            shown = {key: metrics[key] for key in ("loss", "accuracy", "tokens_per_second") if key in metrics}
            self._progress.update(trainer.global_step, pl_module.num_steps, "step", **shown)
        if self._watch is not None:
            self._watch(metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: MegatronGPTSPINModel) -> None:
        """Writes the line of an evaluation in the middle of training."""
        self._write_heldout(trainer, pl_module)

    def finish(self, trainer: Trainer, pl_module: MegatronGPTSPINModel) -> None:
        """Writes the lines that follow the last step. All ranks must call."""
        self._drop_later(trainer)  # a training that was resumed after its last step did not start
        self._write_heldout(trainer, pl_module)
        end = {"split": "end", "step": trainer.global_step - 1, **pl_module.closing_metrics()}
        self._write(trainer, end)
        if trainer.is_global_zero:
            self.sync()

    def sync(self) -> None:
        """Makes all lines durable; the first rank calls, before what is counted from them is."""
        with contextlib.suppress(FileNotFoundError):
            sync_file(self._path)
            sync_directory(self._path.parent)

    def _drop_later(self, trainer: Trainer) -> None:
        """Drops lines of steps that are still to come, and one that a power cut left unreadable."""
        if trainer.is_global_zero and self._path.exists():
            text = self._path.read_text(encoding="utf-8", errors="replace")
            kept = [line for line in text.splitlines() if _step_of(line) < trainer.global_step]
            whole = "".join(line + "\n" for line in kept)
            if whole != text:
                write_text(self._path, whole)

    def _write_heldout(self, trainer: Trainer, pl_module: MegatronGPTSPINModel) -> None:
        metrics = pl_module.last_heldout_metrics
        if not metrics:
            return
        with pl_module.meter.phase("logging"):
            self._write(trainer, {"split": "heldout", "step": trainer.global_step - 1, **metrics})
            _log(trainer, "heldout", metrics)

    def _write(self, trainer: Trainer, line: dict[str, Any]) -> None:
        """Appends one line, on the first rank."""
        if trainer.is_global_zero:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")


def _log(trainer: Trainer, split: str, columns: Columns) -> None:
    """Feeds all loggers; what is not known on this machine is left out."""
    known = {f"{split}/{name}": value for name, value in columns.items() if value is not None}
    for logger in trainer.loggers:
        logger.log_metrics(known, trainer.global_step)


def _step_of(line: str) -> float:
    """The step of a metrics line; infinite for one that was cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")
