"""Random small checkpoints of every family, made by `transformers` from its own classes."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

CLASSES = {  # family -> its classes of configuration and model
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM"),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "phi3": ("Phi3Config", "Phi3ForCausalLM"),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM"),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM"),
    "gpt_neo": ("GPTNeoConfig", "GPTNeoForCausalLM"),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM"),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM"),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
}
COMMON = {  # odd on purpose: nothing is a power of two, the vocabulary is prime
    "vocab_size": 89,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ODD: dict[str, dict[str, Any]] = {  # of each family; 6 heads of these sizes are not the hidden size
    "llama": {"head_dim": 8},
    "mistral": {"head_dim": 10, "sliding_window": 7},
    "qwen2": {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"head_dim": 6},
    "gemma2": {
        "head_dim": 10,
        "query_pre_attn_scalar": 17,
        "sliding_window": 5,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
    },
    "gemma3": {
        "head_dim": 10,
        "query_pre_attn_scalar": 17,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention"],
        "final_logit_softcapping": 5.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
        },
    },
    "phi3": {
        "sliding_window": 9,
        "original_max_position_embeddings": 48,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "short_factor": [1.3],
            "long_factor": [4.0],
        },
    },
    "olmo2": {},
    "gpt2": {"n_inner": 36, "scale_attn_weights": False},
    "gpt_neox": {"rotary_pct": 0.5, "rotary_emb_base": 5e3},
    "gpt_neo": {"window_size": 5, "attention_types": [[["global", "local"], 1]]},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 28,
    },
    "qwen3_moe": {
        "head_dim": 6,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
    },
}
SAVED_AS = {"gpt_neox": {"lm_head.weight": "embed_out.weight"}}  # a parameter's name -> that in files
EXPERTS = {  # stored names of a layer's router and experts, where the model's own are others
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen2_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}
_OWN_NAMES: dict[str, dict[str, Any]] = {  # of COMMON's keys; None: there is none
    "gpt2": {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "intermediate_size": None,
        "num_key_value_heads": None,
    },
    "gpt_neox": {"num_key_value_heads": None},
    "gpt_neo": {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": None,
    },
}


def config_of(family: str, **settings: Any) -> Any:
    """A configuration of the family, by its own class."""
    own = _OWN_NAMES.get(family, {})
    common = {own.get(name, name): value for name, value in COMMON.items()}
    values = {**common, **ODD[family], **settings}
    values.pop(None, None)  # what the family has no name for
    return getattr(transformers, CLASSES[family][0])(**values)


@functools.cache
def _place_for_all() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="nemo_spin-checkpoints-")  # removed when the process ends


@functools.cache
def _saved(family: str, dtype: str, shard_size: str, std: float, settings: str) -> Path:
    torch.manual_seed(11)
    config = config_of(family, **json.loads(settings))
    model = getattr(transformers, CLASSES[family][1])(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: all would be 0 or 1
            parameter.normal_(std=std).add_(0.01)
    directory = Path(tempfile.mkdtemp(dir=_place_for_all().name))
    model.save_pretrained(directory, max_shard_size=shard_size)
    return directory


def make_checkpoint(
    directory: Path,
    family: str = "llama",
    *,
    dtype: str = "float32",
    shards: bool = False,
    std: float = 0.3,
    **settings: Any,
) -> Path:
    """Saves a random model of the family into `directory` (a copy of one made before)."""
    source = _saved(family, dtype, "20KB" if shards else "1GB", std, json.dumps(settings, sort_keys=True))
    shutil.copytree(source, directory, dirs_exist_ok=True)
    return directory


def edit_config(directory: Path, *, remove: tuple[str, ...] = (), **values: Any) -> Path:
    """Changes keys of config.json."""
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in remove}))
    return directory


def as_saved(family: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors named as the model's parameters, named and cut as they are saved."""
    saved: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        renamed = SAVED_AS.get(family, {}).get(name, name)
        if family not in EXPERTS:
            saved[renamed] = tensor
            continue
        place, (gate, up, down) = EXPERTS[family]
        renamed = renamed.replace(".mlp.", f".{place}.")
        stem, _, kind = renamed.rpartition(".")
        if kind not in ("gate_up_proj", "down_proj"):
            saved[renamed] = tensor
            continue
        for expert, values in enumerate(tensor):
            parts = (
                zip((gate, up), values.chunk(2), strict=True) if kind == "gate_up_proj" else [(down, values)]
            )
            saved |= {f"{stem}.{expert}.{part}.weight": part_values for part, part_values in parts}
    return saved
