"""Models to plan for: supported ones, mixtures of experts, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_spin.errors import CheckpointError
from nemo_spin.megatron.costs import active_parameter_count, parameter_count
from nemo_spin.megatron.sizes import shape_of
from nemo_spin.selfplay.planning.model import read_model
from tests.unit.selfplay.planning import models


def test_a_directory_and_its_config_alone(tmp_path: Path) -> None:
    directory = models.write(tmp_path / "model", models.LLAMA_3_8B)
    renamed = tmp_path / "llama.json"
    renamed.write_bytes((directory / "config.json").read_bytes())
    for path in (directory, directory / "config.json", renamed):
        model = read_model(str(path))
        assert parameter_count(model.shape) == 8_030_261_248
        assert model.architecture is not None


@pytest.mark.parametrize(
    ("config", "billions", "active"),
    [
        (models.QWEN3_235B, 235.09, 22.2),  # named 235B-A22B
        (models.MIXTRAL_8X7B, 46.70, 12.88),
        (models.QWEN2_57B, 57.41, 14.2),  # named 57B-A14B
    ],
)
def test_mixtures_of_experts(tmp_path: Path, config: dict[str, Any], billions: float, active: float) -> None:
    model = read_model(str(models.write(tmp_path, config)))
    assert model.architecture is not None
    assert shape_of(model.architecture) == model.shape
    assert parameter_count(model.shape) / 1e9 == pytest.approx(billions, abs=0.005)
    assert active_parameter_count(model.shape) / 1e9 == pytest.approx(active, abs=0.05)


def test_some_layers_without_experts(tmp_path: Path) -> None:
    every_second = models.write(tmp_path / "a", models.QWEN3_235B, decoder_sparse_step=2)
    model = read_model(str(every_second))
    assert model.shape.num_moe_layers == 47
    assert model.architecture is None, "the bridge has no layers of two kinds"
    listed = models.write(tmp_path / "b", models.QWEN3_235B, mlp_only_layers=[0, 1, 93])
    assert read_model(str(listed)).shape.num_moe_layers == 91
    first = models.write(tmp_path / "c", models.QWEN3_235B, first_k_dense_replace=3)
    assert read_model(str(first)).shape.num_moe_layers == 91


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "architectures"),
        ({"architectures": None}, "architectures"),
        ({"architectures": [7]}, "architectures"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "at most 10000"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
    ],
)
def test_what_cannot_be_planned_for(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_model(str(models.write(tmp_path, models.LLAMA_3_8B, **changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": None}, "num_experts_per_tok"),
        ({"num_experts_per_tok": 129}, "at most num_experts, 128"),
        ({"num_experts": "many"}, "num_experts"),
        ({"num_experts": 10**7}, "at most 10000"),
        ({"kv_lora_rank": 512}, "kv_lora_rank"),
        ({"moe_intermediate_size": 0, "intermediate_size": 0}, "intermediate_size"),
    ],
)
def test_mixtures_that_are_not_understood(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_model(str(models.write(tmp_path, models.QWEN3_235B, **changes)))


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(CheckpointError):
            read_model(str(path))
    with pytest.raises(CheckpointError, match="no such file or directory"):
        read_model("no such model")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_model(str(tmp_path))
