"""Rotary embeddings as config.json describes them, in the spellings of transformers 4 and 5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nemo_spin.bridge.hf_values import number, refuse
from nemo_spin.megatron.architecture import RopeScaling

_KINDS = ("default", "linear", "llama3", "yarn", "longrope")
_KEYS = {  # of each kind: what must be there besides theta
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_rope(values: Mapping[str, Any], *, max_positions: int, head_dim: int) -> RopeScaling:
    """Both spellings: `rope_theta` and `rope_scaling` (transformers 4), `rope_parameters` (5).

    Args:
        values: config.json with its defaults.
        max_positions: Longest context the model promises, tokens.
        head_dim: Channels of a head.

    Raises:
        CheckpointError: A value is wrong, or cannot be expressed.
    """
    scaling = values.get("rope_scaling") or values.get("rope_parameters") or {}
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    if not isinstance(scaling, dict):
        raise refuse(key, scaling, "is an object", "mend config.json")
    if any(isinstance(value, dict) for value in scaling.values()):
        raise refuse(
            key, scaling, "one rotary embedding for all layers is supported, not one per kind of layer"
        )
    outer = {name: values[name] for name in ("rope_theta", "partial_rotary_factor") if name in values}
    rope = {"rope_theta": 10000.0, **outer, **{k: v for k, v in scaling.items() if v is not None}}
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = "longrope" if kind == "su" else kind  # the name that Phi-3 was published with
    if kind not in _KINDS:
        raise refuse(f"{key}.rope_type", kind, f"supported are {', '.join(_KINDS)}")
    if values.get("original_max_position_embeddings") is not None:  # wins where some models put it, outside
        rope["original_max_position_embeddings"] = values["original_max_position_embeddings"]
    share = number(
        {"partial_rotary_factor": rope.get("partial_rotary_factor") or 1.0}, "partial_rotary_factor"
    )
    channels = int(head_dim * share)
    if share > 1.0 or channels < 2 or channels % 2:
        rule = "rotary embeddings turn pairs of a head's channels: an even number of them"
        raise refuse(*_culprit(share, head_dim), rule)
    if kind == "yarn":
        return _yarn(rope, key, max_positions, share)
    if kind == "longrope":
        return _longrope(rope, key, max_positions, share, channels)
    numbers: dict[str, Any] = {name: number(rope, name) for name in _KEYS[kind]}
    original = int(numbers.pop("original_max_position_embeddings", 0))
    return RopeScaling(
        theta=number(rope, "rope_theta"),
        kind=kind,
        original_max_position_embeddings=original,
        partial_rotary_factor=share,
        **numbers,
    )


def _culprit(share: float, head_dim: int) -> tuple[str, object]:
    return ("head_dim", head_dim) if share == 1.0 else ("partial_rotary_factor", share)


def _yarn(rope: dict[str, Any], key: str, max_positions: int, share: float) -> RopeScaling:
    """YaRN (arXiv 2309.00071), its attention factor resolved (eq. 22)."""
    if rope.get("truncate", True) is not True:
        raise refuse(f"{key}.truncate", rope["truncate"], "the ends of YaRN's ramp are whole channels (true)")
    factor = number(rope, "factor")
    if "attention_factor" in rope:
        attention_factor = number(rope, "attention_factor")
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        attention_factor = _concentration(factor, number(rope, "mscale"))
        attention_factor /= _concentration(factor, number(rope, "mscale_all_dim"))
    else:
        attention_factor = _concentration(factor, 1.0)
    if attention_factor < 1.0:
        raise refuse(f"{key}.attention_factor", attention_factor, "is 1 or more")
    return RopeScaling(
        theta=number(rope, "rope_theta"),
        kind="yarn",
        factor=factor,
        original_max_position_embeddings=int(number(rope, "original_max_position_embeddings", max_positions)),
        attention_factor=attention_factor,
        beta_fast=number(rope, "beta_fast", 32.0),
        beta_slow=number(rope, "beta_slow", 1.0),
        partial_rotary_factor=share,
    )


def _concentration(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(rope: dict[str, Any], key: str, max_positions: int, share: float, channels: int) -> RopeScaling:
    """LongRoPE (arXiv 2402.13753) within the original context; its attention factor resolved."""
    factors = rope.get("short_factor")
    if not isinstance(factors, list) or len(factors) != channels // 2:
        raise refuse(
            f"{key}.short_factor", factors, f"is a list of {channels // 2} numbers", "mend config.json"
        )
    original = int(number(rope, "original_max_position_embeddings"))
    factor = number(rope, "factor", max_positions / original)
    if rope.get("attention_factor") is not None:
        attention_factor = number(rope, "attention_factor")
    elif factor <= 1.0 or original == 1:
        attention_factor = 1.0
    else:
        attention_factor = math.sqrt(1.0 + math.log(factor) / math.log(original))
    if attention_factor < 1.0:
        raise refuse(f"{key}.attention_factor", attention_factor, "is 1 or more")
    return RopeScaling(
        theta=number(rope, "rope_theta"),
        kind="longrope",
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=attention_factor,
        partial_rotary_factor=share,
        short_factors=tuple(number({f"{key}.short_factor": f}, f"{key}.short_factor") for f in factors),
    )
