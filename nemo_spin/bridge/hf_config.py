"""Reads config.json: from Hugging Face's spellings, old and new, to an `Architecture`.

What Megatron's model cannot express here is refused by its name. What has no part in
fine-tuning is not read: dropout (a policy and its opponent are compared without noise),
`initializer_range` (weights are loaded), `use_cache`, `pretraining_tp` (a way to compute
the same numbers), everything about generation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_spin.bridge.families.table import Family
from nemo_spin.bridge.hf_values import choice, count, flag, number, refuse
from nemo_spin.bridge.hf_windows import read_windows
from nemo_spin.errors import CheckpointError, explain
from nemo_spin.megatron.architecture import Architecture

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
_REFUSED = {  # key -> the only values (besides leaving it out) that can be expressed
    "quantization_config": (None,),
    "compression_config": (None,),  # vLLM's other name for it
    "speculators_config": (None,),  # vLLM would load another model that it names
    "is_encoder_decoder": (False, None),
    "use_bidirectional_attention": (False, None),
}
_ACTIVATIONS = {  # spelling -> ours
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_BIASES = {"qkv_bias": "attention_bias", "attention_output_bias": "attention_bias", "mlp_bias": "mlp_bias"}
_MOST_LAYERS = 10_000  # beyond it the file is wrong


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        CheckpointError: It is missing, or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        raise _unusable(path, reason) from error
    if not isinstance(value, dict):
        raise _unusable(path, "is not a JSON object")
    return value


def _unusable(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        explain(
            str(path),
            found=reason,
            rule="a model is a Hugging Face directory with config.json and safetensors",
            remedy="give the directory of a complete checkpoint, or download it again",
        )
    )


def read_architecture(hf_dir: Path, config: Mapping[str, Any], family: Family) -> Architecture:
    """What `config` says, completed by the family's defaults.

    Raises:
        CheckpointError: A key is missing or has a value that cannot be expressed.
    """
    values = {"hidden_act": family.activations[0], **family.defaults, **config}
    values |= {ours: values[theirs] for ours, theirs in family.keys.items() if theirs in values}
    _check_expressible(values, family)
    hidden_size = count(values, "hidden_size")
    heads = count(values, "num_attention_heads")
    groups = heads if values.get("num_key_value_heads") is None else count(values, "num_key_value_heads")
    if heads % groups:
        raise refuse("num_key_value_heads", groups, f"divides num_attention_heads, which is {heads}")
    head_dim = hidden_size // heads if values.get("head_dim") is None else count(values, "head_dim")
    num_layers = count(values, "num_hidden_layers")
    if num_layers > _MOST_LAYERS:
        raise refuse("num_hidden_layers", num_layers, f"at most {_MOST_LAYERS}", "mend config.json")
    max_positions = count(values, "max_position_embeddings")
    biases: dict[str, Any] = {
        name: flag(values, key) for name, key in _BIASES.items() if name in family.optional
    }
    architecture = Architecture(
        family=family.name,
        hf_architecture=config["architectures"][0],
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=_mlp_width(values, family, hidden_size),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        vocab_size=count(values, "vocab_size"),
        max_position_embeddings=max_positions,
        norm_epsilon=number(values, "rms_norm_eps", 1e-6),
        activation=_ACTIVATIONS[choice(values, "hidden_act", family.activations)],
        tie_word_embeddings=flag(values, "tie_word_embeddings"),
        windows=read_windows(values, num_layers=num_layers, max_positions=max_positions),
        bos_token_id=next(iter(_token_ids(values.get("bos_token_id"))), None),
        eos_token_ids=_eos_token_ids(hf_dir, values),
        torch_dtype=_dtype(values),
        **biases,
    )
    architecture = replace(architecture, **family.fixed)
    return replace(architecture, **family.read(values, architecture))


def _check_expressible(values: Mapping[str, Any], family: Family) -> None:
    refused: dict[str, tuple[Any, ...]] = {
        key: (False, None) for name, key in _BIASES.items() if name not in family.optional
    }
    refused["model_type"] = (family.name, f"{family.name}_text", None)  # by it others choose their classes
    for key, allowed in {**_REFUSED, **refused, **family.allowed}.items():
        if key in values:
            choice(values, key, allowed)


def _mlp_width(values: Mapping[str, Any], family: Family, hidden_size: int) -> int:
    if values.get("intermediate_size") is None and family.mlp_multiple is not None:
        return family.mlp_multiple * hidden_size
    return count(values, "intermediate_size")


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = tuple(value) if isinstance(value, list) else (value,)
    if not ids or not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise refuse("bos_token_id, eos_token_id", value, "are token ids", "mend config.json")
    return ids


def _eos_token_ids(hf_dir: Path, values: Mapping[str, Any]) -> tuple[int, ...]:
    ids = _token_ids(values.get("eos_token_id"))
    path = hf_dir / GENERATION_CONFIG_NAME
    if path.is_file():  # chat models name the end of a turn there
        ids += _token_ids(read_json(path).get("eos_token_id"))
    return tuple(dict.fromkeys(ids))


def _dtype(values: Mapping[str, Any]) -> str | None:
    """`dtype` (transformers 5) or `torch_dtype` (4): float32, bfloat16, float16 or None."""
    name = values.get("dtype") or values.get("torch_dtype")
    if name is None or name == "auto":
        return None
    name = str(name).removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise refuse("dtype", name, "weights are float32, bfloat16 or float16")
    return name
