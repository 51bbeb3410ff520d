"""Llama 2 and 3.x."""

from __future__ import annotations

from nemo_spin.bridge.families.table import Family
from nemo_spin.bridge.mappings import (
    ColumnParallel,
    QueryKeyValue,
    Replicated,
    RowParallel,
    VocabularyParallel,
)

_DECODER = "decoder.layers.{layer}"
_HF = "model.layers.{layer}"

EMBEDDING = VocabularyParallel("embedding.word_embeddings.weight", "model.embed_tokens.weight")
ATTENTION_ROWS = (  # and both norms of a layer
    Replicated(f"{_DECODER}.input_layernorm.weight", f"{_HF}.input_layernorm.weight", ("hidden_size",)),
    QueryKeyValue(
        f"{_DECODER}.self_attention.linear_qkv.weight",
        query=f"{_HF}.self_attn.q_proj.weight",
        key=f"{_HF}.self_attn.k_proj.weight",
        value=f"{_HF}.self_attn.v_proj.weight",
        columns=("hidden_size",),
    ),
    RowParallel(
        f"{_DECODER}.self_attention.linear_proj.weight",
        f"{_HF}.self_attn.o_proj.weight",
        ("hidden_size", "query_size"),
    ),
    Replicated(
        f"{_DECODER}.pre_mlp_layernorm.weight", f"{_HF}.post_attention_layernorm.weight", ("hidden_size",)
    ),
)
LAYER = (
    *ATTENTION_ROWS,
    ColumnParallel(
        f"{_DECODER}.mlp.linear_fc1.weight",
        (f"{_HF}.mlp.gate_proj.weight", f"{_HF}.mlp.up_proj.weight"),
        ("ffn_hidden_size", "hidden_size"),
    ),
    RowParallel(
        f"{_DECODER}.mlp.linear_fc2.weight",
        f"{_HF}.mlp.down_proj.weight",
        ("hidden_size", "ffn_hidden_size"),
    ),
)
QKV_BIAS = (
    QueryKeyValue(
        f"{_DECODER}.self_attention.linear_qkv.bias",
        query=f"{_HF}.self_attn.q_proj.bias",
        key=f"{_HF}.self_attn.k_proj.bias",
        value=f"{_HF}.self_attn.v_proj.bias",
    ),
)
ATTENTION_BIASES = {  # `attention_bias` gives all four of attention's layers one
    "qkv_bias": QKV_BIAS,
    "attention_output_bias": (
        Replicated(
            f"{_DECODER}.self_attention.linear_proj.bias", f"{_HF}.self_attn.o_proj.bias", ("hidden_size",)
        ),
    ),
}
MLP_BIASES = (
    ColumnParallel(
        f"{_DECODER}.mlp.linear_fc1.bias",
        (f"{_HF}.mlp.gate_proj.bias", f"{_HF}.mlp.up_proj.bias"),
        ("ffn_hidden_size",),
    ),
    Replicated(f"{_DECODER}.mlp.linear_fc2.bias", f"{_HF}.mlp.down_proj.bias", ("hidden_size",)),
)
FINAL = (Replicated("decoder.final_layernorm.weight", "model.norm.weight", ("hidden_size",)),)
OUTPUT_LAYER = VocabularyParallel("output_layer.weight", "lm_head.weight")

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    embedding=EMBEDDING,
    layer=LAYER,
    final=FINAL,
    output_layer=OUTPUT_LAYER,
    optional={**ATTENTION_BIASES, "mlp_bias": MLP_BIASES},
    defaults={
        "num_key_value_heads": None,  # as many as query heads
        "head_dim": None,  # hidden_size / num_attention_heads
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
