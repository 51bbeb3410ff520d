"""Resume checkpoints: Megatron's distributed checkpoints, written so that one is whole or not there.

A checkpoint holds weights, optimizer state and a small dictionary of the caller's. It can
be loaded at any other tensor, pipeline or data-parallel size. Directories are named by
optimizer step; an unfinished one keeps a `.partial` name that no reader looks at.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from torch import distributed
from torch.distributed.checkpoint.api import CheckpointException  # no Exception: a BaseException

from nemo_spin.data.files import sync_directory, sync_file
from nemo_spin.errors import CheckpointError, explain
from nemo_spin.megatron.engine import Engine
from nemo_spin.megatron.runtime import first_rank_writes

_NAME = re.compile(r"step-(\d{8})$")
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies."""
    return directory / f"step-{step:08d}"


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in directory.glob("step-*") if _NAME.search(path.name) and path.is_dir()]
    return sorted(found)


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = list_checkpoints(directory)
    return found[-1] if found else None


def _sharded_state(engine: Engine, *, is_loading: bool, with_optimizer: bool) -> dict[str, Any]:
    engine.settle()
    state: dict[str, Any] = {}
    for index, chunk in enumerate(engine.chunks):
        key = "model" if len(engine.chunks) == 1 else f"model{index}"
        module = getattr(chunk, "module", chunk)
        state[key] = module.sharded_state_dict(metadata=dict(_METADATA))
    if with_optimizer and engine.optimizer is not None:
        state["optimizer"] = engine.optimizer.sharded_state_dict(
            dict(state), is_loading=is_loading, metadata=dict(_METADATA)
        )
    return state


def save_checkpoint(engine: Engine, directory: Path, *, step: int, common: dict[str, Any], keep: int) -> None:
    """Writes the checkpoint after `step` optimizer steps. All ranks must call.

    Args:
        engine: Model and optimizer.
        directory: Where checkpoints lie.
        step: Optimizer steps done.
        common: Plain containers, the same on all ranks, returned by `load_checkpoint`.
        keep: How many of the newest checkpoints stay; older ones are removed afterwards.

    Raises:
        DataError: The disk is full; earlier checkpoints are unharmed.
    """
    final = checkpoint_path(directory, step)
    partial = final.with_name(final.name + ".partial")
    with first_rank_writes(engine.runtime) as writes:
        if writes:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    state = _sharded_state(engine, is_loading=False, with_optimizer=True)
    state["common"] = common
    dist_checkpointing.save(state, str(partial), ("torch_dist", 1))
    distributed.barrier()
    with first_rank_writes(engine.runtime) as writes:
        if writes:
            for entry in partial.rglob("*"):
                if entry.is_file():
                    sync_file(entry)
            sync_directory(partial)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            sync_directory(directory)
            for old in list_checkpoints(directory)[:-keep]:
                shutil.rmtree(old)


def load_checkpoint(engine: Engine, path: Path) -> dict[str, Any]:
    """Loads weights and, if the engine has one, the optimizer. All ranks must call.

    Returns:
        What was saved as `common`; nothing where another program saved.

    Raises:
        CheckpointError: The checkpoint cannot be read or is of another model.
    """
    state = _sharded_state(engine, is_loading=True, with_optimizer=True)
    try:
        loaded = dist_checkpointing.load(state, str(path))
        for index, chunk in enumerate(engine.chunks):
            key = "model" if len(engine.chunks) == 1 else f"model{index}"
            getattr(chunk, "module", chunk).load_state_dict(loaded[key])
        if engine.optimizer is not None:
            engine.optimizer.load_state_dict(loaded["optimizer"])
    except (Exception, CheckpointException) as error:
        raise CheckpointError(
            explain(
                str(path),
                found=f"cannot be loaded ({type(error).__name__}: {_last_line(error)})",
                rule="a resume checkpoint belongs to the same model and is complete",
                remedy=f"remove {path}; the run goes on from the checkpoint before it",
            )
        ) from error
    common: dict[str, Any] = loaded.get("common", {})  # Megatron's own have none
    return common


def _last_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[-1] if lines else ""
