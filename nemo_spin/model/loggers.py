"""What NeMo's exp_manager is told of a training's loggers."""

from __future__ import annotations

import secrets
from functools import partial
from pathlib import Path
from typing import Any

from nemo_spin.data.files import write_text
from nemo_spin.megatron.agreement import from_first_rank
from nemo_spin.model.settings import TrainingJob


def logger_settings(job: TrainingJob) -> dict[str, Any]:
    """exp_manager's settings. All ranks must call.

    A training is one W&B run, whichever process goes on with it, unless the user names another.
    """
    settings: dict[str, Any] = {
        "explicit_log_dir": str(job.directory / "logs"),
        "create_checkpoint_callback": False,
        "create_preemption_callback": False,  # `SaveCheckpoints` does it, on CPUs too
        "resume_if_exists": False,
        "log_step_timing": False,
        "seconds_to_sleep": 0,
        **job.exp_manager,
    }
    if settings.get("create_wandb_logger"):
        run_id = from_first_rank(partial(_wandb_id, job.directory))
        settings["wandb_logger_kwargs"] = {"id": run_id, "resume": "allow", **settings["wandb_logger_kwargs"]}
    return settings


def _wandb_id(directory: Path) -> str:
    """Drawn by the first process of a training; its path may be that of another one elsewhere."""
    path = directory / "wandb_id"
    if not path.exists():
        write_text(path, secrets.token_hex(8))
    return path.read_text(encoding="utf-8")
