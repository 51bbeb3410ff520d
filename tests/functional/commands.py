"""The command `nemo-spin`, as a user types it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
VLLM_PYTHON = os.environ.get("NEMO_SPIN_VLLM_PYTHON")  # else .venv-vllm of this repository


def environment() -> dict[str, str]:
    """The environment of a command: this package, one thread per process."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Starts `nemo-spin ARGUMENTS` and returns at once."""
    return subprocess.Popen(
        [sys.executable, "-m", "nemo_spin.cli", *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def nemo_spin(*arguments: str, timeout_s: float = 600.0) -> subprocess.CompletedProcess[str]:
    """Runs `nemo-spin ARGUMENTS` to its end."""
    process = start(*arguments)
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def write_config(path: Path, values: Mapping[str, Any]) -> Path:
    """A YAML file as a user writes it: what differs from `conf/spin.yaml`."""
    path.write_text(yaml.safe_dump({"defaults": ["spin", "_self_"], **values}), encoding="utf-8")
    return path
