"""OLMo 2: Llama's layers with norms after attention and MLP only, and over all queries, all keys together."""

from __future__ import annotations

from nemo_spin.bridge.families.llama import ATTENTION_BIASES, EMBEDDING, FINAL, LAYER, OUTPUT_LAYER
from nemo_spin.bridge.families.table import Family
from nemo_spin.bridge.mappings import ColumnParallel, Replicated

_DECODER = "decoder.layers.{layer}"
_HF = "model.layers.{layer}"

OLMO2 = Family(
    name="olmo2",
    architectures=("Olmo2ForCausalLM",),
    embedding=EMBEDDING,
    layer=(
        *(mapping for mapping in LAYER if "layernorm" not in mapping.megatron),
        ColumnParallel(
            f"{_DECODER}.self_attention.q_layernorm.weight",
            (f"{_HF}.self_attn.q_norm.weight",),
            ("query_size",),
        ),
        ColumnParallel(
            f"{_DECODER}.self_attention.k_layernorm.weight",
            (f"{_HF}.self_attn.k_norm.weight",),
            ("key_size",),
        ),
        Replicated(
            f"{_DECODER}.post_self_attn_layernorm.weight",
            f"{_HF}.post_attention_layernorm.weight",
            ("hidden_size",),
        ),
        Replicated(
            f"{_DECODER}.post_mlp_layernorm.weight",
            f"{_HF}.post_feedforward_layernorm.weight",
            ("hidden_size",),
        ),
    ),
    final=FINAL,
    output_layer=OUTPUT_LAYER,
    optional=ATTENTION_BIASES,
    defaults={
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 50279,
    },
    fixed={"pre_norms": False, "post_norms": True, "whole_qk_norm": True},
)
