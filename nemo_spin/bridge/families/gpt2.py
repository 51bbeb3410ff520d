"""GPT-2: learned positions, norms that subtract the mean, biases, matrices stored as their transposes."""

from __future__ import annotations

from collections.abc import Mapping as Values
from typing import Any

from nemo_spin.bridge.families.table import Family
from nemo_spin.bridge.hf_values import flag
from nemo_spin.bridge.mappings import (
    ColumnParallel,
    FusedQueryKeyValue,
    Replicated,
    RowParallel,
    VocabularyParallel,
    transposed,
)
from nemo_spin.megatron.architecture import Architecture

_DECODER = "decoder.layers.{layer}"
_HF = "transformer.h.{layer}"

EMBEDDING = VocabularyParallel("embedding.word_embeddings.weight", "transformer.wte.weight")
POSITIONS = (
    Replicated(
        "embedding.position_embeddings.weight",
        "transformer.wpe.weight",
        ("max_position_embeddings", "hidden_size"),
    ),
)
NORMS = tuple(
    Replicated(f"{_DECODER}.{ours}.{kind}", f"{_HF}.{theirs}.{kind}", ("hidden_size",))
    for ours, theirs in (("input_layernorm", "ln_1"), ("pre_mlp_layernorm", "ln_2"))
    for kind in ("weight", "bias")
)
FINAL = tuple(
    Replicated(f"decoder.final_layernorm.{kind}", f"transformer.ln_f.{kind}", ("hidden_size",))
    for kind in ("weight", "bias")
)
MLP_BIASES = (
    ColumnParallel(f"{_DECODER}.mlp.linear_fc1.bias", (f"{_HF}.mlp.c_fc.bias",), ("ffn_hidden_size",)),
    Replicated(f"{_DECODER}.mlp.linear_fc2.bias", f"{_HF}.mlp.c_proj.bias", ("hidden_size",)),
)
MLP = (
    ColumnParallel(
        f"{_DECODER}.mlp.linear_fc1.weight",
        (f"{_HF}.mlp.c_fc.weight",),
        ("ffn_hidden_size", "hidden_size"),
    ),
    RowParallel(
        f"{_DECODER}.mlp.linear_fc2.weight", f"{_HF}.mlp.c_proj.weight", ("hidden_size", "ffn_hidden_size")
    ),
)
OUTPUT_LAYER = VocabularyParallel("output_layer.weight", "lm_head.weight")
ACTIVATIONS = ("gelu_new", "gelu", "gelu_fast", "gelu_pytorch_tanh", "relu")


def _read(values: Values[str, Any], _: Architecture) -> Values[str, Any]:
    return {} if flag(values, "scale_attn_weights") else {"softmax_scale": 1.0}


GPT2 = Family(
    name="gpt2",
    architectures=("GPT2LMHeadModel",),
    embedding=EMBEDDING,
    positions=POSITIONS,
    layer=(
        *NORMS,
        transposed(
            FusedQueryKeyValue(
                f"{_DECODER}.self_attention.linear_qkv.weight", f"{_HF}.attn.c_attn.weight", ("hidden_size",)
            )
        ),
        FusedQueryKeyValue(f"{_DECODER}.self_attention.linear_qkv.bias", f"{_HF}.attn.c_attn.bias"),
        transposed(
            RowParallel(
                f"{_DECODER}.self_attention.linear_proj.weight",
                f"{_HF}.attn.c_proj.weight",
                ("hidden_size", "query_size"),
            )
        ),
        Replicated(
            f"{_DECODER}.self_attention.linear_proj.bias", f"{_HF}.attn.c_proj.bias", ("hidden_size",)
        ),
        *(transposed(mapping) for mapping in MLP),
        *MLP_BIASES,
    ),
    final=FINAL,
    output_layer=OUTPUT_LAYER,
    keys={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
        "hidden_act": "activation_function",
        "rms_norm_eps": "layer_norm_epsilon",
    },
    defaults={
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    allowed={"scale_attn_by_inverse_layer_idx": (False, None), "add_cross_attention": (False, None)},
    activations=ACTIVATIONS,
    mlp_multiple=4,
    fixed={
        "gated": False,
        "normalization": "layer",
        "learned_positions": True,
        "qkv_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
    },
    read=_read,
    optional_prefix="transformer.",
    ignored_tensors=(".attn.bias", ".attn.masked_bias"),
)
