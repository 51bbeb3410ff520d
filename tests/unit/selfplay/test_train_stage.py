"""A user's own loss belongs to what a training depends on."""

from pathlib import Path
from typing import Any

import pytest

from nemo_spin.config.load import from_mapping
from nemo_spin.data.files import sha256_file
from nemo_spin.errors import ConfigError
from nemo_spin.selfplay.run_directory import RunDirectory
from nemo_spin.selfplay.stages.stage import Context
from nemo_spin.selfplay.stages.train import TrainStage, _own_loss
from nemo_spin.selfplay.verified import Verified


def test_the_source_of_an_own_loss_is_an_input(tmp_path: Path) -> None:
    source = tmp_path / "own.py"
    source.write_text("def loss(margin):\n    return -margin\n")
    before = _own_loss(f"{source}:loss")
    assert before == {"loss": sha256_file(source)}
    source.write_text("def loss(margin):\n    return -2 * margin\n")
    assert _own_loss(f"{source}:loss") != before


def test_a_loss_with_a_name_adds_nothing() -> None:
    assert _own_loss("logistic") == {}


def test_an_own_loss_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.py"):
        _own_loss(f"{tmp_path}/nowhere.py:loss")


def test_what_is_no_loss_is_refused_before_anything_runs(tmp_path: Path) -> None:
    source = tmp_path / "own.py"
    source.write_text("def loss(margin):\n    return (-margin).mean()\n")
    config, run = from_mapping({"spin": {"loss": f"{source}:loss"}}), RunDirectory(tmp_path / "run")
    nothing_starts: Any = None
    context = Context(config, run, nothing_starts, Verified(run.verified_path), tmp_path)
    with pytest.raises(ConfigError, match="not one value each"):
        TrainStage(context, 1).check()
