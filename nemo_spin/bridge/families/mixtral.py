"""Mixtral: Mistral's layers with experts in place of the MLP."""

from __future__ import annotations

from nemo_spin.bridge.families.experts import expert_rows, read_experts, router_row
from nemo_spin.bridge.families.llama import ATTENTION_ROWS, EMBEDDING, FINAL, OUTPUT_LAYER
from nemo_spin.bridge.families.table import Family

_HF = "model.layers.{layer}.block_sparse_moe"

MIXTRAL = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    embedding=EMBEDDING,
    layer=(
        *ATTENTION_ROWS,
        router_row(f"{_HF}.gate"),
        *expert_rows(f"{_HF}.experts", gate="w1", up="w3", down="w2"),
    ),
    final=FINAL,
    output_layer=OUTPUT_LAYER,
    keys={"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"},
    read=read_experts,
    defaults={
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": None,
        "use_sliding_window": True,
        "max_window_layers": 0,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
