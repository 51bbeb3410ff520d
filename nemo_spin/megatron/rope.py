"""Rotary frequencies of the scaling variants that models on the hub use.

Megatron's rotary embedding takes one base and one scaling; ours replaces its inverse
frequencies, so that attention code and kernels stay Megatron's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nemo_spin.megatron.architecture import RopeScaling


def inverse_frequencies(rope: RopeScaling, head_dim: int) -> Tensor:
    """Inverse frequencies of every rotated pair of channels.

    default: theta^(-2i/d) (arXiv 2104.09864); linear: divided by `factor` (arXiv
    2306.15595); llama3: long wavelengths divided by `factor`, short ones kept, those
    between interpolated (the Llama 3.1 model card); yarn: a ramp between kept and
    divided ones over the rotations a channel makes in the original context (arXiv
    2309.00071, section 3.2).

    Returns:
        [head_dim / 2], float32, on the CPU.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    plain = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    if rope.kind == "yarn":
        return _yarn(plain, rope, head_dim)
    return plain


def _llama3(plain: Tensor, rope: RopeScaling) -> Tensor:
    rotations = rope.original_max_position_embeddings * plain / (2 * math.pi)
    keep = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * plain + (1.0 - keep) * plain / rope.factor


def _yarn(plain: Tensor, rope: RopeScaling, head_dim: int) -> Tensor:
    def channel_with(rotations: float) -> float:
        """Index of the pair of channels that turns `rotations` times in the original context."""
        wavelength = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low = max(math.floor(channel_with(rope.beta_fast)), 0)
    high = min(math.ceil(channel_with(rope.beta_slow)), head_dim - 1)
    indices = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    divide = ((indices - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    return plain * (1.0 - divide) + plain / rope.factor * divide


def concentration_as_scaling_factor(rope: RopeScaling) -> float | None:
    """YaRN's attention factor, in the form Megatron derives it from.

    Megatron multiplies cos and sin by 0.1 ln(s) + 1 of a scaling factor s (arXiv
    2309.00071, eq. 22); this returns the s that gives the model's own factor, or None
    where the factor is 1.
    """
    if rope.kind != "yarn":
        return None
    factor = rope.attention_factor
    if factor is None:
        return rope.factor
    return math.exp((factor - 1.0) / 0.1) if factor > 1.0 else None
