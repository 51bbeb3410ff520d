"""Reads config.json: from Hugging Face's spellings, old and new, to an `Architecture`.

What Megatron's model cannot express here is refused by its name. What has no part in
fine-tuning is not read: dropout (a policy and its opponent are compared without noise),
`initializer_range` (weights are loaded), `use_cache`, `pretraining_tp` (a way to compute
the same numbers), everything about generation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_spin.bridge.families.table import Family
from nemo_spin.errors import CheckpointError, explain
from nemo_spin.megatron.architecture import Architecture, RopeScaling

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
_ROPE_KINDS = ("default", "linear", "llama3", "yarn")
_ROPE_KEYS = {  # of each kind: what must be there besides theta
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}
_REFUSED = {  # key -> the only values (besides leaving it out) that can be expressed
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "is_encoder_decoder": (False, None),
}


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


def refuse(key: str, value: object, rule: str, remedy: str = "choose a model without it") -> CheckpointError:
    """The error for a property of config.json that cannot be expressed."""
    return CheckpointError(explain(f"config.json: {key}", found=repr(value), rule=rule, remedy=remedy))


def read_architecture(hf_dir: Path, config: Mapping[str, Any], family: Family) -> Architecture:
    """What `config` says, completed by the family's defaults.

    Raises:
        CheckpointError: A key is missing or has a value that cannot be expressed.
    """
    values = {**family.defaults, **config}
    for key, allowed in _REFUSED.items():
        if key in values and values[key] not in allowed:
            rule = f"of {key} only {' | '.join(str(value) for value in allowed)} is supported"
            raise refuse(key, values[key], rule)
    hidden_size = _count(values, "hidden_size")
    heads = _count(values, "num_attention_heads")
    groups = heads if values.get("num_key_value_heads") is None else _count(values, "num_key_value_heads")
    if heads % groups:
        raise refuse("num_key_value_heads", groups, f"divides num_attention_heads, which is {heads}")
    head_dim = hidden_size // heads if values.get("head_dim") is None else _count(values, "head_dim")
    if head_dim % 2:
        raise refuse("head_dim", head_dim, "rotary embeddings turn pairs of channels: it is even")
    num_layers = _count(values, "num_hidden_layers")
    max_positions = _count(values, "max_position_embeddings")
    return Architecture(
        family=family.name,
        hf_architecture=config["architectures"][0],
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=_count(values, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        vocab_size=_count(values, "vocab_size"),
        max_position_embeddings=max_positions,
        norm_epsilon=_number(values, "rms_norm_eps", 1e-6),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        tie_word_embeddings=_flag(values, "tie_word_embeddings"),
        rope=_rope(values, max_positions),
        sliding_window=_sliding_window(values, num_layers, max_positions),
        bos_token_id=next(iter(_token_ids(values.get("bos_token_id"))), None),
        eos_token_ids=_eos_token_ids(hf_dir, values),
        torch_dtype=_dtype(values),
    )


def _count(values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise refuse(key, value, "is a positive whole number", "mend config.json or download the model again")
    return value


def _flag(values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key)
    if value not in (True, False, None):
        raise refuse(key, value, "is true or false", "mend config.json or download the model again")
    return bool(value)


def _number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = values.get(key, default)
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not math.isfinite(value)
        or value <= 0
    ):
        raise refuse(key, value, "is a positive number", "mend config.json or download the model again")
    return float(value)


def _rope(values: Mapping[str, Any], max_positions: int) -> RopeScaling:
    """Both spellings: `rope_theta` and `rope_scaling` (transformers 4), `rope_parameters` (5)."""
    scaling = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise refuse("rope_scaling", scaling, "is an object", "mend config.json")
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    if any(isinstance(value, dict) for value in scaling.values()):
        raise refuse(
            key, scaling, "one rotary embedding for all layers is supported, not one per kind of layer"
        )
    outer = {name: values[name] for name in ("rope_theta", "partial_rotary_factor") if name in values}
    rope = {"rope_theta": 10000.0, **outer, **{k: v for k, v in scaling.items() if v is not None}}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_KINDS:
        raise refuse(f"{key}.rope_type", kind, f"supported are {', '.join(_ROPE_KINDS)}")
    if rope.get("partial_rotary_factor", 1.0) not in (1.0, None):
        raise refuse("partial_rotary_factor", rope["partial_rotary_factor"], "all of a head is rotated (1.0)")
    if values.get("original_max_position_embeddings") is not None:  # wins where some models put it, outside
        rope["original_max_position_embeddings"] = values["original_max_position_embeddings"]
    if kind == "yarn":
        return _yarn(rope, key, max_positions)
    numbers = {name: _number(rope, name) for name in _ROPE_KEYS[kind]}
    original = int(numbers.pop("original_max_position_embeddings", 0))
    return RopeScaling(
        theta=_number(rope, "rope_theta"), kind=kind, original_max_position_embeddings=original, **numbers
    )


def _yarn(rope: dict[str, Any], key: str, max_positions: int) -> RopeScaling:
    """YaRN (arXiv 2309.00071), its attention factor resolved (eq. 22)."""
    if rope.get("truncate", True) is not True:
        raise refuse(f"{key}.truncate", rope["truncate"], "the ends of YaRN's ramp are whole channels (true)")
    factor = _number(rope, "factor")
    if "attention_factor" in rope:
        attention_factor = _number(rope, "attention_factor")
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        attention_factor = _concentration(factor, _number(rope, "mscale"))
        attention_factor /= _concentration(factor, _number(rope, "mscale_all_dim"))
    else:
        attention_factor = _concentration(factor, 1.0)
    if attention_factor < 1.0:
        raise refuse(f"{key}.attention_factor", attention_factor, "is 1 or more")
    return RopeScaling(
        theta=_number(rope, "rope_theta"),
        kind="yarn",
        factor=factor,
        original_max_position_embeddings=int(
            _number(rope, "original_max_position_embeddings", max_positions)
        ),
        attention_factor=attention_factor,
        beta_fast=_number(rope, "beta_fast", 32.0),
        beta_slow=_number(rope, "beta_slow", 1.0),
    )


def _concentration(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _sliding_window(values: Mapping[str, Any], num_layers: int, max_positions: int) -> int | None:
    """The window of the layers that have one; None where none can be shorter than the context."""
    window = values.get("sliding_window")
    if window is None or not _flag(values, "use_sliding_window"):
        return None
    window = _count(values, "sliding_window")
    kinds = values.get("layer_types")
    if kinds is None:
        first = values.get("max_window_layers", 0)
        if not isinstance(first, int):
            raise refuse("max_window_layers", first, "is a number of layers", "mend config.json")
        has_window = first < num_layers
    elif isinstance(kinds, list):
        has_window = any(kind != "full_attention" for kind in kinds)
    else:
        raise refuse("layer_types", kinds, "is a list with one kind for each layer", "mend config.json")
    return window if has_window and window < max_positions else None


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
