"""Qwen2 and Qwen2.5: Llama's layers with a bias on query, key and value."""

from __future__ import annotations

from nemo_spin.bridge.families.llama import EMBEDDING, FINAL, LAYER, OUTPUT_LAYER, QKV_BIAS
from nemo_spin.bridge.families.table import Family

QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    embedding=EMBEDDING,
    layer=(*LAYER, *QKV_BIAS),
    final=FINAL,
    output_layer=OUTPUT_LAYER,
    fixed={"qkv_bias": True},
    defaults={
        "num_key_value_heads": 32,
        "head_dim": None,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "max_window_layers": 28,
    },
)
