"""Models and demonstrations that functional tests share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import models


@dataclass(frozen=True)
class TinyData:
    """JSONL files of demonstrations."""

    train: Path
    heldout: Path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face directory of a random two-layer Llama. Do not write into it."""
    return models.write_model(tmp_path_factory.mktemp("models") / "theta_0")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """48 demonstrations to train on and 12 held out. Do not write into them."""
    directory = tmp_path_factory.mktemp("data")
    return TinyData(
        train=models.write_demonstrations(directory / "train.jsonl", 48, seed=1),
        heldout=models.write_demonstrations(directory / "heldout.jsonl", 12, seed=2),
    )
