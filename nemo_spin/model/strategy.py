"""Lightning's view of a Megatron job: who the ranks are, and how a checkpoint is stored.

Megatron owns the model's parallelism, its gradients and its optimizer; the strategy
keeps Lightning from adding its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn
from torch.optim import Optimizer

from nemo_spin.megatron.checkpoint import CheckpointWriter, load_checkpoint
from nemo_spin.megatron.engine import Engine
from nemo_spin.megatron.runtime import Runtime


class MegatronCheckpointIO(CheckpointIO):
    """Stores a Lightning checkpoint as a Megatron distributed checkpoint.

    The loops' and callbacks' state travels as plain containers beside the sharded
    tensors; nothing is unpickled into a class.

    Args:
        writer: Writes the files, at once or in the background.
    """

    def __init__(self, writer: CheckpointWriter) -> None:
        self.engine: Engine | None = None  # set by the model once it is built
        self._writer = writer

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """All ranks must call. The writer names the directory by the step, as `path` does."""
        assert self.engine is not None, "the model is built before it is saved"
        kept = ("epoch", "global_step", "pytorch-lightning_version", "loops", "callbacks")
        common = {name: _plain(checkpoint[name]) for name in kept if name in checkpoint}
        with self.engine.meter.phase("checkpoint"):
            self._writer.save(self.engine, step=int(checkpoint["global_step"]), common=common)

    def load_checkpoint(self, path: str | Path, map_location: Any | None = None) -> dict[str, Any]:
        """All ranks must call. Restores weights and optimizer; returns the loops' state."""
        assert self.engine is not None, "the model is built before it is restored"
        common = load_checkpoint(self.engine, Path(path))
        return {"state_dict": {}, "optimizer_states": [{}], "lr_schedulers": [], **common}

    def remove_checkpoint(self, path: str | Path) -> None:
        """Does nothing: old checkpoints go when a newer one is complete."""


def _plain(value: Any) -> Any:
    """Containers of numbers and strings only, so that a checkpoint needs no class to load."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, int | float | str | bool | type(None)) else str(value)


class MegatronStrategy(DDPStrategy):
    """Runs a model that drives Megatron's schedules itself.

    Being a `DDPStrategy` is what NeMo's exp_manager asks for; no torch DDP is made.

    Args:
        runtime: Process groups, already joined.
        checkpoint_io: Stores and restores the sharded state.
    """

    def __init__(self, runtime: Runtime, checkpoint_io: MegatronCheckpointIO) -> None:
        super().__init__(cluster_environment=TorchElasticEnvironment(), checkpoint_io=checkpoint_io)
        self.runtime = runtime

    @property
    def root_device(self) -> torch.device:
        """The device Megatron put this rank on."""
        return self.runtime.device

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights are restored once model and optimizer exist."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimizer's state is in the distributed checkpoint."""
        return False

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Data-parallel position: ranks of one replica see the same data."""
        return {"num_replicas": self.runtime.dp_size, "rank": self.runtime.dp_rank}

    def setup_distributed(self) -> None:
        """The groups exist; Lightning only learns this rank's number."""
        self.set_world_ranks()
        rank_zero_only.rank = fabric_rank_zero_only.rank = self.runtime.rank

    def configure_ddp(self) -> None:
        """Gradients are summed by Megatron's DistributedDataParallel."""

    def model_to_device(self) -> None:
        """Megatron builds the model where it belongs."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Empty: weights are stored sharded, by the checkpoint IO."""
        return {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Empty, for the same reason."""
        return {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """The checkpoint IO has loaded the weights."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """The checkpoint IO has loaded the optimizer."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Unlike Lightning's, all ranks take part."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return model
