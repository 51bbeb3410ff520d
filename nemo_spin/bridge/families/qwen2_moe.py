"""Qwen1.5-MoE and Qwen2-MoE: Qwen2's attention, experts, and one that every token passes."""

from __future__ import annotations

from collections.abc import Mapping as Values
from typing import Any

from nemo_spin.bridge.families.experts import MLP, expert_rows, read_experts, router_row
from nemo_spin.bridge.families.llama import ATTENTION_ROWS, EMBEDDING, FINAL, OUTPUT_LAYER, QKV_BIAS
from nemo_spin.bridge.families.table import Family
from nemo_spin.bridge.hf_values import count
from nemo_spin.bridge.mappings import ColumnParallel, Replicated, RowParallel
from nemo_spin.megatron.architecture import Architecture

_HF = "model.layers.{layer}.mlp"
_SHARED = (
    ColumnParallel(
        f"{MLP}.shared_experts.linear_fc1.weight",
        (f"{_HF}.shared_expert.gate_proj.weight", f"{_HF}.shared_expert.up_proj.weight"),
        ("shared_expert_ffn_hidden_size", "hidden_size"),
    ),
    RowParallel(
        f"{MLP}.shared_experts.linear_fc2.weight",
        f"{_HF}.shared_expert.down_proj.weight",
        ("hidden_size", "shared_expert_ffn_hidden_size"),
    ),
    Replicated(f"{MLP}.shared_experts.gate_weight", f"{_HF}.shared_expert_gate.weight", (1, "hidden_size")),
)


def _read(values: Values[str, Any], architecture: Architecture) -> dict[str, Any]:
    shared = count(values, "shared_expert_intermediate_size")
    return {**read_experts(values, architecture), "shared_expert_ffn_hidden_size": shared}


QWEN2_MOE = Family(
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    embedding=EMBEDDING,
    layer=(
        *ATTENTION_ROWS,
        *QKV_BIAS,
        router_row(f"{_HF}.gate"),
        *expert_rows(f"{_HF}.experts", gate="gate_proj", up="up_proj", down="down_proj"),
        *_SHARED,
    ),
    final=FINAL,
    output_layer=OUTPUT_LAYER,
    fixed={"qkv_bias": True},
    allowed={"qkv_bias": (True,)},
    read=_read,
    defaults={
        "num_key_value_heads": 16,
        "head_dim": None,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "max_window_layers": 28,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
)
