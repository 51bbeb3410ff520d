"""The whole loop with adapters in place of all weights: Megatron trains them, vLLM answers with them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from nemo_spin.data.files import read_manifest, verify_manifest
from tests.functional.commands import VLLM_PYTHON, nemo_spin, write_config
from tests.functional.conftest import TinyData
from tests.functional.history import assert_trained_on_history

RANK = 4


@pytest.fixture
def config(tiny_model: Path, tiny_data: TinyData, tmp_path: Path) -> Path:
    """Two iterations of adapters, each written for the sampler, too."""
    return write_config(
        tmp_path / "lora.yaml",
        {
            "model": {
                "path": str(tiny_model),
                "global_batch_size": 16,
                "lora": {"rank": RANK, "alpha": 8.0, "export_adapter": True},
            },
            "spin": {"iterations": 2, "lr": 1e-3, "epochs": 1},
            "data": {
                "train": str(tiny_data.train),
                "heldout": str(tiny_data.heldout),
                "max_prompt_length": 64,
                "max_response_length": 32,
                "num_workers": 1,
            },
            "generation": {"python": VLLM_PYTHON, "max_tokens": 16},
            "evaluation": {"num_prompts": 4},
        },
    )


def lines_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def contents(run_dir: Path) -> dict[str, tuple[str, int]]:
    """Every manifest's files, by name, and when each manifest was written."""
    found = {}
    for path in run_dir.rglob("manifest.json"):
        manifest = read_manifest(path.parent)
        assert manifest is not None
        found[str(path.relative_to(run_dir))] = json.dumps(manifest.files), path.stat().st_mtime_ns
    return found


@pytest.mark.slow  # two iterations, each time: a minute or two
@pytest.mark.parametrize("served", [False, True], ids=["merged", "adapters"])
def test_two_iterations_of_adapters_end_and_are_done_again_at_once(
    config: Path, tmp_path: Path, served: bool
) -> None:
    run_dir = tmp_path / "run"
    arguments = ("run", "--config", str(config), f"run_dir={run_dir}", f"generation.adapters={served}")
    result = nemo_spin(*arguments)
    assert result.returncode == 0, result.stderr + result.stdout
    for iteration in (0, 1):
        here = run_dir / f"iter_{iteration:02d}"
        lines = lines_of(here)
        first = next(line for line in lines if line["split"] == "train")
        assert first["step"] == 0
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-5), "B is 0: the policy is its opponent"
        scored = read_manifest(here / "scored")
        assert scored is not None and 0 < scored.counts["sampler_difference"] < 1e-4
        peft = json.loads((here / "adapter" / "adapter_config.json").read_text())
        assert peft["r"] == RANK * (iteration + 1), "all that was learned since theta_0"
        manifest = read_manifest(here / "model")
        assert manifest is not None
        verify_manifest(here / "model", manifest)
    ways = [
        line["way"] for number in (0, 1) for line in lines_of(run_dir / f"iter_{number:02d}") if "way" in line
    ]
    new = "adapted" if served else "refreshed"
    assert ways == ["started", "kept", new, "kept", new]
    assert_trained_on_history(run_dir, iterations=2, epochs=1)
    before = contents(run_dir)
    again = nemo_spin(*arguments)
    assert again.returncode == 0, again.stderr
    assert "theta_2" in again.stdout
    assert contents(run_dir) == before
