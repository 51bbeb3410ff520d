"""A user's own loss belongs to what a training depends on."""

from pathlib import Path

import pytest

from nemo_spin.data.files import sha256_file
from nemo_spin.errors import ConfigError
from nemo_spin.selfplay.stages.train import _own_loss


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
