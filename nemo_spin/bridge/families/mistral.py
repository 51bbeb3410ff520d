"""Mistral (7B and its kin); with a sliding window in every layer, where there is one."""

from __future__ import annotations

from nemo_spin.bridge.families.llama import EMBEDDING, FINAL, LAYER, OUTPUT_LAYER
from nemo_spin.bridge.families.table import Family

MISTRAL = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    embedding=EMBEDDING,
    layer=LAYER,
    final=FINAL,
    output_layer=OUTPUT_LAYER,
    defaults={
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,  # null in config.json means none; leaving it out does not
        "use_sliding_window": True,
        "max_window_layers": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
