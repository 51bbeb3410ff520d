"""Gemma 2: scaled embeddings, norms before and after, capped scores and logits, alternating windows."""

from __future__ import annotations

import math
from collections.abc import Mapping as Values
from typing import Any

from nemo_spin.bridge.families.llama import ATTENTION_BIASES, EMBEDDING, FINAL, LAYER, OUTPUT_LAYER
from nemo_spin.bridge.families.table import Family, read_one_rope
from nemo_spin.bridge.hf_values import number, optional_number
from nemo_spin.bridge.mappings import Replicated
from nemo_spin.megatron.architecture import Architecture

_DECODER = "decoder.layers.{layer}"
_HF = "model.layers.{layer}"
_NORMS = {
    "pre_mlp_layernorm": "pre_feedforward_layernorm",
    "post_self_attn_layernorm": "post_attention_layernorm",
    "post_mlp_layernorm": "post_feedforward_layernorm",
}
GEMMA_LAYER = (
    *(mapping for mapping in LAYER if not mapping.megatron.endswith("pre_mlp_layernorm.weight")),
    *(
        Replicated(f"{_DECODER}.{ours}.weight", f"{_HF}.{theirs}.weight", ("hidden_size",))
        for ours, theirs in _NORMS.items()
    ),
)
GEMMA_FIXED = {"zero_centered_norms": True, "post_norms": True}
GEMMA_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
    "sliding_window": 4096,
    "use_sliding_window": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


def read_gemma(values: Values[str, Any], architecture: Architecture) -> Values[str, Any]:
    """What Gemma's attention, embedding and output differ in."""
    return {
        "embedding_scale": math.sqrt(architecture.hidden_size),
        "softmax_scale": number(values, "query_pre_attn_scalar") ** -0.5,
        "attention_logit_cap": optional_number(values, "attn_logit_softcapping"),
        "logit_cap": optional_number(values, "final_logit_softcapping"),
    }


GEMMA2 = Family(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    embedding=EMBEDDING,
    layer=GEMMA_LAYER,
    final=FINAL,
    output_layer=OUTPUT_LAYER,
    optional=ATTENTION_BIASES,
    keys={"hidden_act": "hidden_activation"},
    activations=("gelu_pytorch_tanh",),
    defaults={
        **GEMMA_DEFAULTS,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    fixed=GEMMA_FIXED,
    read=lambda values, architecture: {
        **read_gemma(values, architecture),
        **read_one_rope(values, architecture),
    },
)
