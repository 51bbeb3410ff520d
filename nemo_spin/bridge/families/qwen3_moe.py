"""Qwen3-MoE: Qwen3's attention, and experts in place of the MLP."""

from __future__ import annotations

from nemo_spin.bridge.families.experts import expert_rows, read_experts, router_row
from nemo_spin.bridge.families.llama import (
    ATTENTION_BIASES,
    ATTENTION_ROWS,
    EMBEDDING,
    FINAL,
    OUTPUT_LAYER,
)
from nemo_spin.bridge.families.qwen3 import QK_NORMS
from nemo_spin.bridge.families.table import Family

_HF = "model.layers.{layer}.mlp"

QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    embedding=EMBEDDING,
    layer=(
        *ATTENTION_ROWS,
        *QK_NORMS,
        router_row(f"{_HF}.gate"),
        *expert_rows(f"{_HF}.experts", gate="gate_proj", up="up_proj", down="down_proj"),
    ),
    final=FINAL,
    output_layer=OUTPUT_LAYER,
    optional=ATTENTION_BIASES,
    fixed={"qk_norm": True},
    keys={"num_experts": "num_local_experts"},  # as newer releases of transformers write it
    read=read_experts,
    defaults={
        "num_key_value_heads": 4,
        "head_dim": None,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "use_sliding_window": False,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
)
