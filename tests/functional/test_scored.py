"""What `scored/` holds, against `transformers` in float64 on the opponent's own directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_spin.data.files import read_manifest
from nemo_spin.data.pairs import training_rows
from tests.distributed import reference
from tests.functional.commands import VLLM_PYTHON, nemo_spin, write_config
from tests.functional.conftest import TinyData


@pytest.fixture(scope="module")
def generated(
    tiny_model: Path, tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A run directory whose opponent has answered."""
    directory = tmp_path_factory.mktemp("scored")
    values = {
        "model": {"path": str(tiny_model), "global_batch_size": 8},
        "data": {
            "train": str(tiny_data.train),
            "heldout": str(tiny_data.heldout),
            "max_prompt_length": 64,
            "max_response_length": 32,
            "num_workers": 1,
        },
        "generation": {"python": VLLM_PYTHON, "max_tokens": 16, "shard_rows": 16},
    }
    config = write_config(directory / "config.yaml", values)
    for stage in ("prepare", "generate"):
        result = nemo_spin(stage, "--config", str(config), f"run_dir={directory / 'run'}")
        assert result.returncode == 0, result.stderr
    return directory, values


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_scored_log_probabilities(
    generated: tuple[Path, dict[str, Any]], tiny_model: Path, tmp_path: Path, tensor: int, pipeline: int
) -> None:
    directory, _ = generated
    run_dir = tmp_path / "run"
    shutil.copytree(directory / "run", run_dir, symlinks=True)
    result = nemo_spin(
        "score",
        "--config",
        str(directory / "config.yaml"),
        f"run_dir={run_dir}",
        f"trainer.devices={tensor * pipeline}",
        f"model.tensor_model_parallel_size={tensor}",
        f"model.pipeline_model_parallel_size={pipeline}",
    )
    assert result.returncode == 0, result.stderr
    scored = run_dir / "iter_00" / "scored"
    table = training_rows(scored, "train")
    assert table.num_rows == 48
    with torch.no_grad():
        expected = reference.logps(reference.load(tiny_model), table)
    for index, kind in enumerate(("real", "generated")):
        found = torch.tensor(table[f"opponent_{kind}_logps"].to_pylist(), dtype=torch.float64)
        assert (found - expected[:, index]).abs().max() < 1e-3
    manifest = read_manifest(scored)
    assert manifest is not None
    assert 0 < manifest.counts["sampler_difference"] < 1e-3, "vLLM and Megatron agree on each token"
