"""Qwen2 and Qwen2.5: Llama's layers with a bias on query, key and value."""

from __future__ import annotations

from nemo_spin.bridge.families.llama import EMBEDDING, FINAL, LAYER, OUTPUT_LAYER
from nemo_spin.bridge.families.table import Family
from nemo_spin.bridge.mappings import QueryKeyValue

QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    embedding=EMBEDDING,
    layer=(
        *LAYER,
        QueryKeyValue(
            "decoder.layers.{layer}.self_attention.linear_qkv.bias",
            query="model.layers.{layer}.self_attn.q_proj.bias",
            key="model.layers.{layer}.self_attn.k_proj.bias",
            value="model.layers.{layer}.self_attn.v_proj.bias",
        ),
    ),
    final=FINAL,
    output_layer=OUTPUT_LAYER,
    qkv_bias=True,
    defaults={
        "num_key_value_heads": 32,
        "head_dim": None,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "max_window_layers": 28,
    },
)
