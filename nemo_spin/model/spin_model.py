"""The NeMo model class: SPIN (or plain fine-tuning) on Megatron's GPTModel.

A thin adapter. `nemo_spin.megatron` builds, steps, scores and stores; this class gives
it NeMo's and Lightning's hooks. One Lightning batch is one global batch, and its rows
follow from the number of the optimizer step alone, so a resumed run sees the data it
would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from nemo.core.classes import ModelPT
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, Dataset

from nemo_spin.bridge.families import architecture_of
from nemo_spin.bridge.import_hf import load_weights
from nemo_spin.data.datasets import PAIRS, REAL_ONLY, Batches, Units
from nemo_spin.data.pairs import (
    has_rows,
    prepared_rows,
    shard_paths,
    training_rows,
    with_base,
    without_identical,
)
from nemo_spin.errors import GateError, explain
from nemo_spin.megatron.agreement import from_first_rank
from nemo_spin.megatron.architecture import Architecture
from nemo_spin.megatron.engine import Engine, layout_of
from nemo_spin.megatron.forward_step import SFT_SUMS, SPIN_SUMS, LossFunction, sft_loss, spin_loss, summarise
from nemo_spin.megatron.learning_rate import learning_rate
from nemo_spin.megatron.lora import attach, seed_dropout
from nemo_spin.megatron.meter import Meter
from nemo_spin.megatron.optimizers import (
    build_optimizer,
    offloaded_share,
    uses_distributed_optimizer,
    wrap_for_training,
)
from nemo_spin.megatron.provider import build_model
from nemo_spin.megatron.runtime import Runtime
from nemo_spin.megatron.sizes import shape_of
from nemo_spin.megatron.throughput import Throughput
from nemo_spin.model.connector import MegatronSaveRestoreConnector
from nemo_spin.model.optimizer import MegatronOptimizerAdapter
from nemo_spin.model.settings import TrainingJob
from nemo_spin.model.telemetry import COMPUTING, Telemetry
from nemo_spin.objective.objective import Objective, build_objective

_DTYPES = {"32": torch.float32, "bf16": torch.bfloat16}
_EVALUATION_UNITS = 256  # per data-parallel rank and schedule call, for held-out rows


def _agreed_shards(directory: Path, split: str) -> list[Path]:
    """The shards that the first rank sees. All ranks must call."""
    return from_first_rank(partial(shard_paths, directory, split))


class _Steps(Dataset[int]):
    """Numbers Lightning's batches; what a batch holds follows from the optimizer step."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        return index


class MegatronGPTSPINModel(ModelPT):
    """A policy in training against the opponent it started as.

    Args:
        job: What to train, on what, and how.
        runtime: This rank's place; process groups are joined.
        trainer: Lightning's trainer.

    Attributes:
        identical_pairs: Training pairs of twice the same response, which were dropped.
    """

    def __init__(self, job: TrainingJob, runtime: Runtime, trainer: Any = None) -> None:
        self.job = job
        self.runtime = runtime
        self.engine: Engine | None = None
        self.last_metrics: dict[str, float] = {}
        self.identical_pairs = 0
        self.last_heldout_metrics: dict[str, float] = {}
        self.companions: Any = None  # keeps a restored model's tokenizer files
        self._telemetry: Telemetry
        self._heldout: Units | None = None
        self._units: Units
        self._adapter: MegatronOptimizerAdapter
        super().__init__(OmegaConf.create({"job": job.as_plain()}), trainer)
        self._save_restore_connector = MegatronSaveRestoreConnector()
        if job.rows is not None:
            self.setup_training_data({"split": "train"})
            self.setup_validation_data({"split": "heldout"})

    @classmethod
    def list_available_models(cls) -> None:
        """There are no pretrained models of this class: it starts from a user's."""
        return

    # Data

    def setup_training_data(self, train_data_config: Any) -> None:
        """Reads the training rows; one Lightning batch is one optimizer step. All ranks must call."""
        self._units = self._read(train_data_config["split"])
        self._train_dl: Any = DataLoader(_Steps(self.num_steps), batch_size=None)

    def setup_validation_data(self, val_data_config: Any) -> None:
        """Reads the held-out rows, where there are any; they are one Lightning batch. All ranks must call."""
        rows, split = self.job.rows, val_data_config["split"]
        is_there = rows is not None and from_first_rank(partial(has_rows, rows, split))
        units = self._read(split) if is_there else None
        self._heldout = units if units is not None and units.num_units else None
        self._validation_dl: Any = DataLoader(_Steps(1), batch_size=None)

    def _read(self, split: str) -> Units:
        assert self.job.rows is not None, "a model without rows has no data"
        if self.job.objective == "sft":
            return Units(prepared_rows(self.job.rows, split), REAL_ONLY)
        rows = training_rows(self.job.rows, split, listing=_agreed_shards)
        if split == "train" and not self._objective.identical_count:
            differing = without_identical(rows)
            self.identical_pairs = rows.num_rows - differing.num_rows
            rows = differing
        if self.job.base:
            base = [Path(directory) for directory in self.job.base]
            rows = with_base(rows, base, split, listing=_agreed_shards)
        return Units(rows, PAIRS)

    @property
    def batches(self) -> Batches:
        """The global batches of this training."""
        return Batches(
            num_units=self._units.num_units,
            global_batch_size=self.job.model.global_batch_size,
            epochs=self.job.epochs,
            seed=self.job.seed,
            iteration=self.job.iteration,
        )

    @property
    def units(self) -> Units:
        """The training rows."""
        return self._units

    @property
    def num_steps(self) -> int:
        """Optimizer steps in all."""
        steps = self.batches.num_steps
        return steps if self.job.max_steps is None else min(steps, self.job.max_steps)

    # Model and optimizer

    def configure_model(self) -> None:
        """Builds this rank's share of the policy, as a copy of the opponent, and its optimizer."""
        if self.engine is None:
            opponent = self.job.opponent
            self.build(lambda chunks, architecture: load_weights(chunks, opponent, architecture))

    def build(self, load: Callable[[list[Any], Architecture], None]) -> None:
        """Builds this rank's share of the policy and its optimizer. All ranks must call.

        Args:
            load: Fills the model's chunks.
        """
        job, dtype = self.job, _DTYPES[self.job.precision]
        architecture = architecture_of(job.opponent)
        chunks = build_model(architecture, job.model, params_dtype=dtype)
        load(chunks, architecture)
        if job.model.lora.rank is not None:
            attach(chunks, job.model.lora, runtime=self.runtime, seed=f"{job.seed}/{job.iteration}")
        replicas = self.runtime.dp_size * self.runtime.cp_size
        distributed = uses_distributed_optimizer(job.model, dp_size=replicas)
        wrapped = wrap_for_training(chunks, distributed_optimizer=distributed, model=job.model)
        optimizer = build_optimizer(
            wrapped,
            job.optim,
            lr=job.lr,
            params_dtype=dtype,
            distributed=distributed,
            offload_fraction=offloaded_share(job.model),
        )
        self.engine = Engine(wrapped, self.runtime, architecture.vocab_size, layout_of(job.model), optimizer)
        if job.rows is not None:
            throughput = Throughput(
                shape_of(architecture), self.runtime, precision=job.precision, model=job.model
            )
            self._telemetry = Telemetry(
                self._units, throughput, meter=self.engine.meter, runtime=self.runtime
            )

    def configure_optimizers(self) -> MegatronOptimizerAdapter:
        """Megatron's optimizer, which sets each step's learning rate itself."""
        assert self.engine is not None, "configure_model comes first"
        self._adapter = MegatronOptimizerAdapter(self.engine, self._learning_rate)
        return self._adapter

    def _learning_rate(self) -> float:
        # self-play that stops early has the schedule of all its epochs, as the official runs do
        planned = self.num_steps if self.job.objective == "sft" else self.batches.num_steps
        return learning_rate(
            self.trainer.global_step, num_steps=planned, peak=self.job.lr, sched=self.job.optim.sched
        )

    @cached_property
    def loss_function(self) -> LossFunction:
        """What is summed over a global batch.

        Raises:
            ConfigError: The loss is a user's function that cannot be used.
        """
        if self.job.objective == "sft":
            return sft_loss
        return partial(spin_loss, objective=self._objective)

    @cached_property
    def _objective(self) -> Objective:
        return build_objective(**self.job.spin)

    @property
    def _names(self) -> tuple[str, ...]:
        return SFT_SUMS if self.job.objective == "sft" else SPIN_SUMS

    # .nemo files

    def save_to(self, save_path: str | Path) -> None:
        """Writes a .nemo file. All ranks must call; `save_path` is on storage that all nodes see.

        Raises:
            DataError: The disk is full.
        """
        self._save_restore_connector.save_to(self, str(Path(save_path).expanduser().resolve()))

    @classmethod
    def restore_from(cls, restore_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """A model from a .nemo file, at any layout; see `MegatronSaveRestoreConnector.restore_from`.

        All ranks must call. `ModelPT.restore_from` says what the arguments are.
        """
        if kwargs.get("save_restore_connector") is None:
            kwargs["save_restore_connector"] = MegatronSaveRestoreConnector()
        return super().restore_from(str(restore_path), *args, **kwargs)

    # Lightning's steps

    def training_step(self, batch: Any, batch_idx: int = 0) -> torch.Tensor:
        """Forward and backward of one global batch, over all microbatches and stages."""
        assert self.engine is not None, "configure_model comes first"
        step = self.trainer.global_step
        if self.job.model.lora.dropout:
            seed_dropout(self.runtime, f"{self.job.seed}/{self.job.iteration}/{step}")
        with self.meter.phase(COMPUTING):
            sums = self.engine.backward(
                self._units, self.batches.indices(step), loss=self.loss_function, names=self._names
            )
        self.last_metrics = summarise(sums)
        self._check_first_loss(step)
        tokens = sums["real_tokens"] + sums.get("generated_tokens", 0.0)
        self.last_metrics.update(step=step, response_tokens=tokens)
        return torch.tensor(self.last_metrics["loss"])

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Megatron's schedule has run the backward passes."""

    def optimizer_zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """The engine clears gradients before it computes new ones."""

    @property
    def meter(self) -> Meter:
        """Where the time goes."""
        assert self.engine is not None, "configure_model comes first"
        return self.engine.meter

    def restart_clock(self) -> None:
        """What passed until now belongs to no step."""
        self._telemetry.closing()

    def step_metrics(self) -> dict[str, float | None]:
        """What the step just made looked like, and how fast it was. All ranks must call, once."""
        return {
            **self.last_metrics,
            "grad_norm": self._adapter.grad_norm,
            "lr": self._adapter.param_groups[0]["lr"],
            **self._telemetry.step(self.batches.indices(int(self.last_metrics["step"]))),
        }

    def closing_metrics(self) -> dict[str, float | None]:
        """Where the time after the last step went. All ranks must call."""
        return self._telemetry.closing()

    def validation_step(self, batch: Any = None, batch_idx: int = 0) -> None:
        """Evaluates all held-out rows."""
        self.last_heldout_metrics = self.evaluate_heldout()

    def on_validation_epoch_end(self, sync_metrics: bool = False) -> None:
        """`evaluate_heldout` has already summed over ranks."""

    def evaluate_heldout(self) -> dict[str, float]:
        """Loss, margin, accuracy and log-probabilities on held-out rows. All ranks must call."""
        assert self.engine is not None, "configure_model comes first"
        if self._heldout is None:
            return {}
        with self.meter.phase("evaluation"):
            sums = self.engine.evaluate(
                self._heldout,
                batch_units=_EVALUATION_UNITS * self.runtime.dp_size,
                loss=self.loss_function,
                names=self._names,
            )
        return summarise(sums)

    def _rounding_of_first_loss(self) -> float:
        """What bfloat16 may add to the first loss: beta 2^-8 sqrt(n), n response tokens of a unit.

        Scoring and training cut their microbatches differently, and matrix products of other shapes
        round differently: 2^-8 nats for a token, independently of the others, and losses have a slope of
        at most about 1 where the margin is 0.
        """
        if self.job.precision == "32":
            return 0.0
        tokens = self.last_metrics["real_tokens"] + self.last_metrics["generated_tokens"]
        summed = 2.0**-8 * math.sqrt(tokens)
        return float(self.job.spin["beta"]) * (
            summed / tokens if self.job.spin.get("length_normalized") else summed
        )

    def _check_first_loss(self, step: int) -> None:
        """The ln 2 gate: before the first update the policy is its opponent, every gain is 0."""
        if step > 0 or self.job.ln2_tolerance is None or self.job.objective == "sft":
            return
        expected, found = self.last_metrics["start_loss"], self.last_metrics["loss"]
        tolerance = self.job.ln2_tolerance + self._rounding_of_first_loss()
        if math.isfinite(found) and abs(found - expected) <= tolerance:
            return
        raise GateError(
            explain(
                "ln 2 gate (spin.gates.ln2_tolerance)",
                found=f"the first loss is {found:.6f}, margin {self.last_metrics['margin']:+.6f}",
                rule=f"before the first update the policy is its opponent and the {self.job.spin['loss']} "
                f"loss is {expected:.6f} (+- {tolerance:g}): scoring and training see the same tokens",
                remedy="compare what scored/ was made with and what is trained: precision, padding, "
                "position handling, weights; remove scored/ of this iteration to score again",
            )
        )
