"""Gemma 3 (text): Gemma 2 with query and key norms, and other rotations in layers with a window."""

from __future__ import annotations

from collections.abc import Mapping as Values
from typing import Any

from nemo_spin.bridge.families.gemma2 import GEMMA_DEFAULTS, GEMMA_FIXED, GEMMA_LAYER, read_gemma
from nemo_spin.bridge.families.llama import ATTENTION_BIASES, EMBEDDING, FINAL, OUTPUT_LAYER
from nemo_spin.bridge.families.qwen3 import QK_NORMS
from nemo_spin.bridge.families.table import Family
from nemo_spin.bridge.hf_rope import read_rope
from nemo_spin.bridge.hf_values import refuse
from nemo_spin.megatron.architecture import Architecture

_GLOBAL_THETA, _LOCAL_THETA = 1_000_000.0, 10_000.0


def _read(values: Values[str, Any], architecture: Architecture) -> Values[str, Any]:
    """`rope_parameters` by kind of layer (transformers 5), or scaled global and plain local ones (4)."""
    parameters = values.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise refuse("rope_parameters", parameters, "is an object", "mend config.json")
    full = {
        "rope_theta": values.get("rope_theta") or _GLOBAL_THETA,
        "rope_scaling": values.get("rope_scaling"),
        "rope_parameters": parameters.get("full_attention"),
    }
    windowed = {
        "rope_theta": values.get("rope_local_base_freq") or _LOCAL_THETA,
        "rope_parameters": parameters.get("sliding_attention"),
    }
    sizes = {"max_positions": architecture.max_position_embeddings, "head_dim": architecture.head_dim}
    rope, windowed_rope = read_rope(full, **sizes), read_rope(windowed, **sizes)
    kinds = {rope.kind, windowed_rope.kind}
    if kinds & {"yarn", "longrope"} or rope.rotated_channels(256) != windowed_rope.rotated_channels(256):
        rule = "both kinds of layers turn as many channels, without an attention factor"
        raise refuse("rope_parameters", sorted(kinds), rule)
    changes = {**read_gemma(values, architecture), "rope": rope}
    return {**changes, "windowed_rope": windowed_rope} if architecture.windows else changes


GEMMA3 = Family(
    name="gemma3",
    architectures=("Gemma3ForCausalLM",),
    embedding=EMBEDDING,
    layer=(*GEMMA_LAYER, *QK_NORMS),
    final=FINAL,
    output_layer=OUTPUT_LAYER,
    optional=ATTENTION_BIASES,
    keys={"hidden_act": "hidden_activation"},
    activations=("gelu_pytorch_tanh",),
    defaults={
        **GEMMA_DEFAULTS,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131_072,
        "sliding_window_pattern": 6,
        "vocab_size": 262_208,
    },
    fixed={**GEMMA_FIXED, "qk_norm": True},
    read=_read,
)
