"""A training is one run of W&B, and what a user says of it comes first. Nothing is sent anywhere."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_spin.config.load import from_mapping
from nemo_spin.model.loggers import logger_settings
from nemo_spin.selfplay.ranks.train import _loggers


def wandb_settings(train: Path, **given: Any) -> dict[str, Any]:
    """The arguments of W&B's logger in a process that trains in `train`."""
    kwargs = {"project": "selfplay", **given}
    config = from_mapping(
        {"name": "tulu", "exp_manager": {"create_wandb_logger": True, "wandb_logger_kwargs": kwargs}}
    )
    job: Any = SimpleNamespace(directory=train, exp_manager=_loggers(config))
    settings: dict[str, Any] = logger_settings(job)["wandb_logger_kwargs"]
    return settings


def test_every_process_of_a_training_goes_on_with_its_run(tmp_path: Path) -> None:
    first, again = (wandb_settings(tmp_path / "iter_00" / "train") for _ in range(2))
    assert first == again == {"project": "selfplay", "group": "tulu", "id": first["id"], "resume": "allow"}
    assert len(first["id"]) == 16
    other = wandb_settings(tmp_path / "iter_01" / "train")
    assert other["id"] != first["id"] and other["group"] == "tulu"


def test_what_the_user_sets_stays(tmp_path: Path) -> None:
    given = {"group": "mine", "id": "one", "resume": "must", "name": "tiny"}
    assert wandb_settings(tmp_path, **given) == {"project": "selfplay", **given}


def test_without_wandb_nothing_is_left_for_it(tmp_path: Path) -> None:
    job: Any = SimpleNamespace(directory=tmp_path, exp_manager=_loggers(from_mapping({})))
    assert logger_settings(job)["create_wandb_logger"] is False
    assert list(tmp_path.iterdir()) == []
