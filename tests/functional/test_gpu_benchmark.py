"""The GPU benchmark's rehearsal: the whole script, with tiny models, wherever tests run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "benchmarks" / "gpu.sh"


def test_the_script_tests_measures_and_prints_its_table_last(tmp_path: Path) -> None:
    results = tmp_path / "gpu.json"
    settings = {"PYTHON": sys.executable, "GPU_BENCH_TINY": "1", "GPU_BENCH_JSON": str(results)}
    done = subprocess.run(
        ["bash", str(SCRIPT)],
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert any("skipped" in line or "passed" in line for line in lines), "the result of tests/gpu"
    sides = ["local", *(["TRL"] if importlib.util.find_spec("trl") else [])]
    expected = [["tiny", side, row] for side in sides for row in ("64", "128")]
    assert lines[-len(expected) - 1].split()[:4] == ["model", "layers", "row", "tokens/s"]
    assert [line.split()[:3] for line in lines[-len(expected) :]] == expected
    measured = json.loads(results.read_text(encoding="utf-8"))
    assert measured["card"]["flops"] > 0
    for entry in measured["training"]:
        if entry["layers"] == "local":
            assert 0 < entry["flops_per_second"] < measured["card"]["flops"] * 10
        assert entry["tokens_per_second"] > 0


def test_what_an_interpreter_lacks_is_named(tmp_path: Path) -> None:
    """A Python without torch: an environment with nothing in it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True)
    done = subprocess.run(
        ["bash", str(SCRIPT)],
        env=os.environ | {"PYTHON": str(tmp_path / "bin" / "python"), "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "has no torch megatron omegaconf" in done.stderr and "remedy:" in done.stderr
