"""Qwen3 (dense): Llama's layers with a norm on the queries and keys of every head."""

from __future__ import annotations

from nemo_spin.bridge.families.llama import ATTENTION_BIASES, EMBEDDING, FINAL, LAYER, OUTPUT_LAYER
from nemo_spin.bridge.families.table import Family
from nemo_spin.bridge.mappings import Replicated

QK_NORMS = (
    Replicated(
        "decoder.layers.{layer}.self_attention.q_layernorm.weight",
        "model.layers.{layer}.self_attn.q_norm.weight",
        ("head_dim",),
    ),
    Replicated(
        "decoder.layers.{layer}.self_attention.k_layernorm.weight",
        "model.layers.{layer}.self_attn.k_norm.weight",
        ("head_dim",),
    ),
)

QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    embedding=EMBEDDING,
    layer=(*LAYER, *QK_NORMS),
    final=FINAL,
    output_layer=OUTPUT_LAYER,
    optional=ATTENTION_BIASES,
    fixed={"qk_norm": True},
    defaults={
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "max_window_layers": 28,
    },
)
