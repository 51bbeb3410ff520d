"""The NeMo-style script reaches the same loop, and the same messages, as the command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.functional.commands import REPOSITORY, environment


def run(tmp_path: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    script = REPOSITORY / "examples" / "train_gpt_spin.py"
    return subprocess.run(
        [sys.executable, str(script), f"run_dir={tmp_path / 'run'}", "data.train=x.jsonl", *overrides],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_mistake_ends_with_its_message_and_leaves_nothing(tmp_path: Path) -> None:
    result = run(tmp_path, f"model.path={tmp_path / 'nowhere'}")
    assert result.returncode == 2
    assert "there is no such directory" in result.stderr and "remedy:" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_must_be_given_is_named(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.returncode == 2
    assert "model.path" in result.stderr and "remedy:" in result.stderr
