"""Runs a training job through Lightning's trainer and NeMo's exp_manager."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

from lightning.pytorch import Trainer
from nemo.utils.exp_manager import exp_manager

from nemo_spin.data.overlong import training_note
from nemo_spin.data.progress import Progress
from nemo_spin.errors import PreemptedError
from nemo_spin.megatron.checkpoint import CheckpointWriter, load_optimizer_state
from nemo_spin.megatron.checkpoint_files import newest_whole_checkpoint
from nemo_spin.megatron.engine import layout_of
from nemo_spin.megatron.runtime import Runtime
from nemo_spin.model.callbacks import SaveCheckpoints
from nemo_spin.model.loggers import logger_settings
from nemo_spin.model.metrics_file import MetricsFile, Watch
from nemo_spin.model.preemption import Preemption
from nemo_spin.model.settings import TrainingJob
from nemo_spin.model.spin_model import MegatronGPTSPINModel
from nemo_spin.model.strategy import MegatronCheckpointIO, MegatronStrategy

logger = logging.getLogger(__name__)


class _Policy(MegatronGPTSPINModel):
    """Introduces the engine to the checkpoint IO as soon as it exists.

    Attributes:
        carried: Checkpoint whose optimizer state the training begins with.
    """

    carried: Path | None = None

    def configure_model(self) -> None:
        super().configure_model()
        assert self.engine is not None, "configure_model builds it"
        self.trainer.strategy.checkpoint_io.engine = self.engine
        if self.carried is not None:
            load_optimizer_state(self.engine, self.carried)
            self.carried = None


def fit(
    job: TrainingJob,
    *,
    runtime: Runtime,
    devices: int,
    num_nodes: int,
    progress: Progress,
    started: float,
    watch: Watch | None = None,
) -> Path:
    """Trains, resuming from the newest complete checkpoint. All ranks must call.

    Args:
        job: What to train.
        runtime: This rank's place; process groups are joined.
        devices, num_nodes: Ranks per node, and nodes.
        progress: Told of every step; only the first rank's is shown.
        watch: Given every step's metrics on all ranks; what it raises ends the training.
        started: `time.monotonic()` when this process began; the time until the first step is reported.

    Returns:
        The checkpoint after the last optimizer step.

    Raises:
        GateError: The first loss is not what it is at margin 0.
        CheckpointError: The checkpoint to resume from cannot be read.
        PreemptedError: A rank got SIGTERM or SIGUSR1; a checkpoint of the last step is saved.
    """
    warnings.filterwarnings("ignore", module="lightning")
    metrics = MetricsFile(
        job.metrics_path, progress, log_every_n_steps=job.log_every_n_steps, started=started, watch=watch
    )
    writer = CheckpointWriter(
        job.checkpoint_directory,
        keep=job.save_top_k,
        asynchronous=job.async_save,
        before_publishing=metrics.sync,
    )
    preemption = Preemption(runtime)
    saver = SaveCheckpoints(job.checkpoint_directory, job.save_interval, writer=writer, preemption=preemption)
    strategy = MegatronStrategy(runtime, MegatronCheckpointIO(writer))
    check_every = job.val_check_interval
    trainer = Trainer(
        accelerator=runtime.device.type if runtime.device.type == "cpu" else "gpu",
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        precision="32-true",  # Megatron holds the parameters' own type
        max_epochs=-1,
        max_steps=1,  # set below, once the rows are counted
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=1.0 if check_every else 0,
        val_check_interval=check_every,
        check_val_every_n_epoch=None if check_every else 1,
        logger=False,
        callbacks=[metrics, saver],
        log_every_n_steps=1,
    )
    exp_manager(trainer, logger_settings(job))
    model = _Policy(job, runtime, trainer)
    trainer.fit_loop.epoch_loop.max_steps = model.num_steps
    overlong = training_note(layout_of(job.model), model.units)
    if overlong is not None:
        progress.note(overlong)
    resume = newest_whole_checkpoint(job.checkpoint_directory, runtime=runtime, note=progress.note)
    if resume is not None:
        progress.note(f"resuming from {resume.name}")
    elif job.carried is not None:
        model.carried = job.carried
    with preemption.noticed():
        trainer.fit(model, ckpt_path=resume)
    if saver.left is not None:
        raise PreemptedError(saver.left)
    model.validation_step()
    last = saver.save_last(trainer)
    if job.nemo_path is not None:
        with model.meter.phase("checkpoint"):
            model.save_to(job.nemo_path)
    metrics.finish(trainer, model)
    for logger in trainer.loggers:
        logger.finalize("success")  # again, with what was measured after the last step
    return last
