"""The opponent of an iteration: theta_0 at first, then what the iteration before exported."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from nemo_spin.bridge.checkpoint_files import check_checkpoint, weights_sha256
from nemo_spin.selfplay.stages.stage import Context


def opponent_dir(context: Context, iteration: int | None) -> Path:
    """Where theta_t lies: `model.path` for iteration 0 and for plain fine-tuning."""
    return context.run.iteration(iteration - 1).model if iteration else context.theta_0


def served(context: Context, iteration: int | None) -> dict[str, Any]:
    """What the sampler loads for theta_t: `model_dir`, and `adapter_dir` beside it or None.

    And `check_model`, which reads all weights once, and again only where a file was touched.

    Args:
        context: The stage's.
        iteration: t.
    """
    if not iteration or not context.config.generation.adapters:
        loaded, adapter = opponent_dir(context, iteration), None
    else:
        loaded, adapter = context.theta_0, context.run.iteration(iteration - 1).adapter
    check_model = partial(context.verified.sound, check=check_checkpoint)
    return {"model_dir": loaded, "adapter_dir": adapter, "check_model": check_model}


def opponent_canary(context: Context, iteration: int | None) -> Path | None:
    """What Megatron said about theta_t when it was exported; None for a user's own model."""
    return context.run.iteration(iteration - 1).canary_path if iteration else None


def opponent_sha256(context: Context, iteration: int | None) -> str:
    """Hash of the contents of theta_t."""
    return weights_of(context, opponent_dir(context, iteration))


def weights_of(context: Context, model_dir: Path) -> str:
    """Hash of the contents of a model directory, computed only if a file of it was touched."""
    return context.verified.weights_sha256(model_dir, weights_sha256)


def link_opponent(context: Context, iteration: int | None) -> None:
    """Makes `opponent` point at theta_t: absolute for a user's model, relative inside the run."""
    link = context.run.at(iteration).opponent
    target = Path("..") / f"iter_{iteration - 1:02d}" / "model" if iteration else context.theta_0
    if link.is_symlink() and Path(os.readlink(link)) == target:
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    partial = link.with_name(f".{link.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    os.replace(partial, link)
