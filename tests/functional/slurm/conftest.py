"""One cluster for all tests of this directory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.functional.commands import environment
from tests.functional.slurm import cluster as slurm
from tests.functional.slurm.cluster import Cluster


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes, node1 and node2."""
    reason = slurm.missing()
    if reason is not None:
        pytest.skip(reason)
    with slurm.running(tmp_path_factory.mktemp("slurm") / "cluster") as started:
        started.environment |= {
            name: value for name, value in environment().items() if name in ("PYTHONPATH", "OMP_NUM_THREADS")
        }
        yield started
