"""GPT-Neo: GPT-2 with separate, unscaled attention that is local in some layers."""

from __future__ import annotations

from collections.abc import Mapping as Values
from typing import Any

from nemo_spin.bridge.families.gpt2 import (
    ACTIVATIONS,
    EMBEDDING,
    FINAL,
    MLP,
    MLP_BIASES,
    NORMS,
    OUTPUT_LAYER,
    POSITIONS,
)
from nemo_spin.bridge.families.table import Family
from nemo_spin.bridge.hf_values import count, refuse
from nemo_spin.bridge.hf_windows import windows_of
from nemo_spin.bridge.mappings import QueryKeyValue, Replicated, RowParallel
from nemo_spin.megatron.architecture import Architecture

_DECODER = "decoder.layers.{layer}"
_HF = "transformer.h.{layer}.attn.attention"
_MOST_REPEATS = 10_000


def _read(values: Values[str, Any], architecture: Architecture) -> Values[str, Any]:
    kinds = _kinds(values.get("attention_types"))
    if len(kinds) != architecture.num_layers:
        rule = f"is local or global for each of {architecture.num_layers} layers"
        raise refuse("attention_types", values.get("attention_types"), rule, "mend config.json")
    windows = windows_of(
        [kind == "local" for kind in kinds],
        count(values, "window_size"),
        architecture.max_position_embeddings,
    )
    return {"softmax_scale": 1.0, "windows": windows}


def _kinds(types: Any) -> list[str]:
    """[[["global", "local"], 2], …] written out: global, local, global, local, …; empty if it is wrong."""
    kinds: list[str] = []
    for entry in types if isinstance(types, list) else ():
        if not isinstance(entry, list) or len(entry) != 2:
            return []
        names, repeats = entry
        if not isinstance(names, list) or not isinstance(repeats, int) or repeats > _MOST_REPEATS:
            return []
        if any(name not in ("global", "local") for name in names):
            return []
        kinds += names * repeats
    return kinds


GPT_NEO = Family(
    name="gpt_neo",
    architectures=("GPTNeoForCausalLM",),
    embedding=EMBEDDING,
    positions=POSITIONS,
    layer=(
        *NORMS,
        QueryKeyValue(
            f"{_DECODER}.self_attention.linear_qkv.weight",
            query=f"{_HF}.q_proj.weight",
            key=f"{_HF}.k_proj.weight",
            value=f"{_HF}.v_proj.weight",
            columns=("hidden_size",),
        ),
        RowParallel(
            f"{_DECODER}.self_attention.linear_proj.weight",
            f"{_HF}.out_proj.weight",
            ("hidden_size", "query_size"),
        ),
        Replicated(f"{_DECODER}.self_attention.linear_proj.bias", f"{_HF}.out_proj.bias", ("hidden_size",)),
        *MLP,
        *MLP_BIASES,
    ),
    final=FINAL,
    output_layer=OUTPUT_LAYER,
    keys={
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "hidden_act": "activation_function",
        "rms_norm_eps": "layer_norm_epsilon",
    },
    defaults={
        "max_position_embeddings": 2048,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "attention_types": [[["global", "local"], 12]],
        "window_size": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    activations=ACTIVATIONS,
    mlp_multiple=4,
    fixed={
        "gated": False,
        "normalization": "layer",
        "learned_positions": True,
        "attention_output_bias": True,
        "mlp_bias": True,
    },
    read=_read,
    optional_prefix="transformer.",
    ignored_tensors=(".attn.attention.bias", ".attn.attention.masked_bias"),
)
