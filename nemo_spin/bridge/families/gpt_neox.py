"""GPT-NeoX and Pythia: attention and MLP side by side, partial rotations, heads stored as in Megatron."""

from __future__ import annotations

from collections.abc import Mapping as Values
from typing import Any

from nemo_spin.bridge.families.gpt2 import ACTIVATIONS
from nemo_spin.bridge.families.table import Family, read_one_rope
from nemo_spin.bridge.hf_values import flag
from nemo_spin.bridge.mappings import ColumnParallel, Replicated, RowParallel, VocabularyParallel
from nemo_spin.megatron.architecture import Architecture

_DECODER = "decoder.layers.{layer}"
_HF = "gpt_neox.layers.{layer}"


def _read(values: Values[str, Any], architecture: Architecture) -> Values[str, Any]:
    parallel = flag(values, "use_parallel_residual")
    return {"parallel_residual": parallel, **read_one_rope(values, architecture)}


GPT_NEOX = Family(
    name="gpt_neox",
    architectures=("GPTNeoXForCausalLM",),
    embedding=VocabularyParallel("embedding.word_embeddings.weight", "gpt_neox.embed_in.weight"),
    layer=(
        *(
            Replicated(f"{_DECODER}.{ours}.{kind}", f"{_HF}.{theirs}.{kind}", ("hidden_size",))
            for ours, theirs in (
                ("input_layernorm", "input_layernorm"),
                ("pre_mlp_layernorm", "post_attention_layernorm"),
            )
            for kind in ("weight", "bias")
        ),
        # query, key and value of a head lie together, and there are no shared keys: a group is a head
        ColumnParallel(
            f"{_DECODER}.self_attention.linear_qkv.weight",
            (f"{_HF}.attention.query_key_value.weight",),
            ("query_key_value_size", "hidden_size"),
        ),
        RowParallel(
            f"{_DECODER}.self_attention.linear_proj.weight",
            f"{_HF}.attention.dense.weight",
            ("hidden_size", "query_size"),
        ),
        ColumnParallel(
            f"{_DECODER}.mlp.linear_fc1.weight",
            (f"{_HF}.mlp.dense_h_to_4h.weight",),
            ("ffn_hidden_size", "hidden_size"),
        ),
        ColumnParallel(
            f"{_DECODER}.mlp.linear_fc1.bias", (f"{_HF}.mlp.dense_h_to_4h.bias",), ("ffn_hidden_size",)
        ),
        RowParallel(
            f"{_DECODER}.mlp.linear_fc2.weight",
            f"{_HF}.mlp.dense_4h_to_h.weight",
            ("hidden_size", "ffn_hidden_size"),
        ),
        Replicated(f"{_DECODER}.mlp.linear_fc2.bias", f"{_HF}.mlp.dense_4h_to_h.bias", ("hidden_size",)),
    ),
    optional={
        "qkv_bias": (
            ColumnParallel(
                f"{_DECODER}.self_attention.linear_qkv.bias",
                (f"{_HF}.attention.query_key_value.bias",),
                ("query_key_value_size",),
            ),
        ),
        "attention_output_bias": (
            Replicated(
                f"{_DECODER}.self_attention.linear_proj.bias",
                f"{_HF}.attention.dense.bias",
                ("hidden_size",),
            ),
        ),
    },
    final=tuple(
        Replicated(f"decoder.final_layernorm.{kind}", f"gpt_neox.final_layer_norm.{kind}", ("hidden_size",))
        for kind in ("weight", "bias")
    ),
    output_layer=VocabularyParallel("output_layer.weight", "embed_out.weight"),
    keys={
        "rms_norm_eps": "layer_norm_eps",
        "rope_theta": "rotary_emb_base",
        "partial_rotary_factor": "rotary_pct",
    },
    defaults={
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "attention_bias": True,
        "use_parallel_residual": True,
        "partial_rotary_factor": 0.25,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    activations=ACTIVATIONS,
    fixed={"gated": False, "normalization": "layer", "mlp_bias": True},
    read=_read,
    ignored_tensors=(".attention.rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
)
