"""Phi-3, Phi-3.5 and Phi-4 (dense): Llama's layers with query, key, value and gate, up stored as one each."""

from __future__ import annotations

from nemo_spin.bridge.families.llama import EMBEDDING, FINAL, LAYER, OUTPUT_LAYER
from nemo_spin.bridge.families.table import Family
from nemo_spin.bridge.mappings import FusedColumnParallel, FusedQueryKeyValue

_FUSED = {
    "decoder.layers.{layer}.self_attention.linear_qkv.weight": FusedQueryKeyValue(
        "decoder.layers.{layer}.self_attention.linear_qkv.weight",
        "model.layers.{layer}.self_attn.qkv_proj.weight",
        ("hidden_size",),
    ),
    "decoder.layers.{layer}.mlp.linear_fc1.weight": FusedColumnParallel(
        "decoder.layers.{layer}.mlp.linear_fc1.weight",
        "model.layers.{layer}.mlp.gate_up_proj.weight",
        2,
        ("ffn_hidden_size", "hidden_size"),
    ),
}

PHI3 = Family(
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    embedding=EMBEDDING,
    layer=tuple(_FUSED.get(mapping.megatron, mapping) for mapping in LAYER),
    final=FINAL,
    output_layer=OUTPUT_LAYER,
    defaults={
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "use_sliding_window": True,
        "max_window_layers": 0,
        "bos_token_id": 1,
        "eos_token_id": 32000,
    },
)
