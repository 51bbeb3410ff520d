"""What only a GPU can show: everything here is skipped where there is none."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture
def groups() -> Iterator[None]:
    """Leaves the process groups that a test joined."""
    yield
    from nemo_spin.megatron.runtime import finalize

    finalize()


@pytest.fixture
def transformer_engine() -> None:
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine is not installed")
