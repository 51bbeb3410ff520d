"""`examples/nemo_run_spin.py`: its commands here, what nemo-run makes of them where it is installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.functional.commands import REPOSITORY, environment

SCRIPT = REPOSITORY / "examples" / "nemo_run_spin.py"
HOSTILE = "name=a b'c $(touch harm)"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """Loaded without nemo-run, which it imports when it is used."""
    specification = importlib.util.spec_from_file_location("nemo_run_spin", SCRIPT)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_command_is_the_one_of_a_user(example: ModuleType, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    local = example.parsed(["--config", "my.yaml", "seed=2", "--gpus-per-node", "2"])
    assert example.command(local) == [
        *("run", "--config", f"{tmp_path}/my.yaml", "trainer.devices=2", "trainer.num_nodes=1", "seed=2")
    ]
    cluster = example.parsed(["--executor", "slurm", "--nodes", "2", "--config", "recipe/qwen3_8b"])
    assert example.command(cluster)[2:] == [
        *("recipe/qwen3_8b", "trainer.devices=1", "trainer.num_nodes=2", "launcher=external")
    ]


@pytest.mark.skipif(
    importlib.util.find_spec("nemo_run") is None,
    reason='needs nemo-run (pip install nemo-run "leptonai<0.28"), which the pinned environments leave out',
)
@pytest.mark.parametrize("executor", ["local", "slurm"])
def test_nemo_run_takes_it(executor: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--dry-run", "--executor", executor, "--account", "lab", HOSTILE],
        env={**environment(), "NEMORUN_HOME": str(tmp_path / "home"), "COLUMNS": "10000"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    said = done.stdout + done.stderr
    if executor == "slurm":
        assert "#SBATCH --signal=USR1@300" in said
        assert """launcher=external 'name=a b'"'"'c $(touch harm)'""" in said
    else:
        assert HOSTILE in said
    assert not list(tmp_path.rglob("harm"))
