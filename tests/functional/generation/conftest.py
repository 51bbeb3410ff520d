"""One undisturbed run of the generate stage, which many tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import prepared
from tests.functional.generation.harness import Stage


@pytest.fixture(scope="session")
def prepared_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 prompts to train on, 12 held out. Do not write into it."""
    directory = tmp_path_factory.mktemp("prepared") / "data"
    return prepared.write(directory, train=prepared.rows(40, seed=1), heldout=prepared.rows(12, seed=2))


@pytest.fixture(scope="session")
def reference(tiny_model: Path, prepared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A stage that ran through. Do not write into it."""
    stage = Stage(tiny_model, prepared_dir, tmp_path_factory.mktemp("reference"))
    stage.run()
    return stage
