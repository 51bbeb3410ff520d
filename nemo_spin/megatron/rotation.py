"""Rotating queries and keys by their angles, where Transformer Engine has no kernel for it: on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_waves: Any = WeakTensorKeyDictionary()  # cosines and sines of angles, for as long as these are held


def rotate(tensor: Tensor, angles: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turns channel i with channel i + R/2 by their angle (arXiv 2104.09864, section 3.4.2).

    Takes the place of Transformer Engine's `fused_apply_rotary_pos_emb`, with its arguments. All
    layers of a forward pass share one set of cosines and sines, and nothing else is kept.

    Args:
        tensor: [S, B, N, D], queries or keys.
        angles: [S, 1, 1, R] float32, R <= D; its two halves are equal. Channels from R on stay.
        interleaved: Must be false; that neighbouring channels turn together is not supported.

    Returns:
        [S, B, N, D], dtype of `tensor`.
    """
    assert not interleaved, "no family here has neighbouring channels turn together"
    result: Tensor = _Rotation.apply(tensor, *_cosines_and_sines(angles, tensor.dtype))
    return result


def _cosines_and_sines(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    known = _waves.get(angles)
    if known is None or known[0].dtype != dtype:
        known = _waves[angles] = (angles.cos().to(dtype), angles.sin().to(dtype))
    cosines, sines = known
    return cosines, sines


class _Rotation(torch.autograd.Function):
    """The gradient is turned back by the same angles."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _turned(tensor, cosines, sines, sign=1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _turned(grads[0], *ctx.saved_tensors, sign=-1.0), None, None


def _turned(tensor: Tensor, cosines: Tensor, sines: Tensor, *, sign: float) -> Tensor:
    rotated = cosines.shape[-1]
    half = rotated // 2
    result = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    torch.mul(tensor[..., :rotated], cosines, out=result[..., :rotated])
    result[..., :half].addcmul_(tensor[..., half:rotated], sines[..., :half], value=-sign)
    result[..., half:rotated].addcmul_(tensor[..., :half], sines[..., :half], value=sign)
    if rotated < tensor.shape[-1]:
        result[..., rotated:] = tensor[..., rotated:]
    return result
