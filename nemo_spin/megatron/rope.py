"""Rotary frequencies of the scaling variants that models on the hub use.

Megatron's rotary embedding takes one base and one scaling; ours replaces its inverse
frequencies, so that attention code and kernels stay Megatron's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor, nn

from nemo_spin.megatron.architecture import RopeScaling


def inverse_frequencies(rope: RopeScaling, head_dim: int) -> Tensor:
    """Inverse frequencies of every rotated pair of channels.

    default: theta^(-2i/d) (arXiv 2104.09864); linear: divided by `factor` (arXiv
    2306.15595); llama3: long wavelengths divided by `factor`, short ones kept, those
    between interpolated (the Llama 3.1 model card); yarn: a ramp between kept and
    divided ones over the rotations a channel makes in the original context (arXiv
    2309.00071, section 3.2); longrope: each divided by a factor of its own (arXiv
    2402.13753), those of sequences within the original context.

    Returns:
        [channels / 2], float32, on the CPU; of the channels of a head that are rotated.
    """
    channels = rope.rotated_channels(head_dim)
    exponents = torch.arange(0, channels, 2, dtype=torch.float32, device="cpu") / channels
    plain = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    if rope.kind == "yarn":
        return _yarn(plain, rope, channels)
    if rope.kind == "longrope":
        return plain / torch.tensor(rope.short_factors, dtype=torch.float32, device="cpu")
    return plain


def _llama3(plain: Tensor, rope: RopeScaling) -> Tensor:
    rotations = rope.original_max_position_embeddings * plain / (2 * math.pi)
    keep = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * plain + (1.0 - keep) * plain / rope.factor


def _yarn(plain: Tensor, rope: RopeScaling, channels: int) -> Tensor:
    def channel_with(rotations: float) -> float:
        """Index of the pair of channels that turns `rotations` times in the original context."""
        wavelength = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return channels * math.log(wavelength) / (2 * math.log(rope.theta))

    low = max(math.floor(channel_with(rope.beta_fast)), 0)
    high = min(math.ceil(channel_with(rope.beta_slow)), channels - 1)
    indices = torch.arange(channels // 2, dtype=torch.float32, device="cpu")
    divide = ((indices - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    return plain * (1.0 - divide) + plain / rope.factor * divide


def concentration_as_scaling_factor(rope: RopeScaling) -> float | None:
    """YaRN's and longrope's attention factor, in the form Megatron derives it from.

    Megatron multiplies cos and sin by 0.1 ln(s) + 1 of a scaling factor s (arXiv
    2309.00071, eq. 22); this returns the s that gives the model's own factor, or None
    where the factor is 1.
    """
    if rope.kind not in ("yarn", "longrope"):
        return None
    factor = rope.attention_factor
    if factor is None:
        return rope.factor
    return math.exp((factor - 1.0) / 0.1) if factor > 1.0 else None


class PositionedRotaryEmbedding(RotaryEmbedding):
    """Rotary angles at the positions of a packed row, where responses continue from their prompt.

    Megatron asks its rotary embedding for the angles of positions 0 ... S-1. This one
    answers with those of the forward pass's own `position_ids`, which a hook on the model
    hands over (`attach`).

    Args:
        rope: Frequencies.
        head_dim: Channels of a head.
        config: Megatron's TransformerConfig.
        windowed: Frequencies of the layers with a window, where they are others.
    """

    def __init__(
        self, rope: RopeScaling, head_dim: int, config: Any, *, windowed: RopeScaling | None = None
    ) -> None:
        super().__init__(
            kv_channels=head_dim,
            rotary_percent=rope.partial_rotary_factor,
            rotary_interleaved=config.rotary_interleaved,
            use_cpu_initialization=True,
        )
        kinds = [rope] if windowed is None else [rope, windowed]
        frequencies = torch.stack([inverse_frequencies(kind, head_dim) for kind in kinds])
        self.inv_freq = frequencies.to(torch.cuda.current_device())
        self._position_ids: Tensor | None = None

    def attach(self, model: nn.Module) -> None:
        """Has `model` (a GPTModel) hand its `position_ids` over at each forward pass."""

        def hand_over(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._position_ids = kwargs["position_ids"] if "position_ids" in kwargs else args[1]

        model.register_forward_pre_hook(hand_over, with_kwargs=True)

    def forward(self, max_seq_len: int, *args: Any, **kwargs: Any) -> Tensor:
        """Angles of the forward pass in progress; rows share positions.

        Returns:
            [S, 1, 1, rotated channels] float32; [2, S, 1, 1, rotated channels] where layers with a
            window turn by others, which are the second.
        """
        assert self._position_ids is not None, "attach() comes before the first forward pass"
        angles = self._position_ids[0].float()[None, :, None] * self.inv_freq[:, None, :]
        angles = torch.cat((angles, angles), dim=-1)[:, :, None, None, :]
        return angles[0] if len(angles) == 1 else angles
