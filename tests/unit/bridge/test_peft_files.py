"""Names, shapes and settings of an adapter as `peft` writes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nemo_spin.bridge.families import llama
from nemo_spin.bridge.families.table import Family
from nemo_spin.bridge.peft_files import adapter_shapes, peft_config, projection_names
from nemo_spin.config.schema import LoraConfig
from nemo_spin.errors import CheckpointError
from nemo_spin.megatron.architecture import Architecture

ARCHITECTURE = Architecture(
    family="llama",
    hf_architecture="LlamaForCausalLM",
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=12,
    num_attention_heads=2,
    num_query_groups=1,
    head_dim=6,  # unlike hidden_size / num_attention_heads
    vocab_size=11,
    max_position_embeddings=16,
    norm_epsilon=1e-6,
)


def test_every_projection_has_its_module() -> None:
    names = projection_names(ARCHITECTURE, LoraConfig(rank=4))
    attention, mlp = "model.layers.{layer}.self_attn", "model.layers.{layer}.mlp"
    assert names == {
        **{name: f"{attention}.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
        **{name: f"{mlp}.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
    }


def test_shapes() -> None:
    shapes = adapter_shapes(
        ARCHITECTURE, LoraConfig(rank=4, target_modules=["q_proj", "v_proj", "down_proj"])
    )
    prefix = "base_model.model.model.layers.1"
    assert len(shapes) == 2 * 3 * 2
    assert shapes[f"{prefix}.self_attn.q_proj.lora_A.weight"] == (4, 8)
    assert shapes[f"{prefix}.self_attn.q_proj.lora_B.weight"] == (12, 4)
    assert shapes[f"{prefix}.self_attn.v_proj.lora_B.weight"] == (6, 4)
    assert shapes[f"{prefix}.mlp.down_proj.lora_A.weight"] == (4, 12)
    assert shapes[f"{prefix}.mlp.down_proj.lora_B.weight"] == (8, 4)


def test_settings() -> None:
    lora = LoraConfig(rank=4, alpha=8.0, dropout=0.05)
    modules = ["model.layers.{layer}.mlp.up_proj", "model.layers.{layer}.self_attn.q_proj"]
    config = peft_config(lora, modules, base=Path("/models/theta"))
    assert config["r"] == 4 and config["lora_alpha"] == 8 and isinstance(config["lora_alpha"], int)
    assert config["lora_dropout"] == 0.05
    assert config["target_modules"] == ["q_proj", "up_proj"]
    assert config["base_model_name_or_path"] == "/models/theta"


def test_adapters_of_several_iterations_are_one_with_the_same_scale() -> None:
    lora = LoraConfig(rank=4, alpha=10.0, target_modules=["q_proj"])
    shapes = adapter_shapes(ARCHITECTURE, lora, count=3)
    assert set(shapes.values()) == {(12, 8), (12, 12)}
    config = peft_config(lora, ["model.layers.{layer}.self_attn.q_proj"], base=Path("/theta"), count=3)
    assert (config["r"], config["lora_alpha"]) == (12, 30)


def test_a_family_that_stores_projections_as_one_tensor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is Llama's without query, key and value, as a family with one tensor for them has it."""
    fused: Family = replace(
        llama.LLAMA, layer=tuple(m for m in llama.LAYER if "linear_qkv" not in m.megatron)
    )
    monkeypatch.setattr("nemo_spin.bridge.peft_files.family_of", lambda architecture: fused)
    with pytest.raises(CheckpointError, match=r"model\.lora\.export_adapter"):
        projection_names(ARCHITECTURE, LoraConfig(rank=4))
