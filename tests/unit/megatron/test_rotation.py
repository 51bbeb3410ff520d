"""The rotation of queries and keys, against complex numbers in float64, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from nemo_spin.megatron.rotation import rotate

POSITIONS, HEADS = 5, 3


def _angles(channels: int) -> Tensor:
    """[S, 1, 1, channels], both halves alike."""
    half = torch.outer(torch.arange(POSITIONS) * 7.0, 10.0 ** -torch.arange(channels // 2).float())
    return torch.cat([half, half], dim=-1)[:, None, None, :]


def _turned(tensor: Tensor, angles: Tensor) -> Tensor:
    """Channels i and i + R/2 as the parts of a number that is multiplied by e^(i angle)."""
    channels = angles.shape[-1]
    rotated = tensor[..., :channels].double()
    first, second = rotated.chunk(2, dim=-1)
    numbers = torch.complex(first, second) * torch.exp(1j * angles[..., : channels // 2].double())
    return torch.cat([numbers.real, numbers.imag, tensor[..., channels:].double()], dim=-1)


@pytest.mark.parametrize("channels", [8, 4], ids=["all-channels", "half-of-them"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_values_and_gradients(dtype: torch.dtype, tolerance: float, channels: int) -> None:
    torch.manual_seed(2)
    projected = torch.randn(POSITIONS, 1, HEADS, 10).to(dtype).requires_grad_()
    angles, upstream = _angles(channels), torch.randn(POSITIONS, 1, HEADS, 8).to(dtype)
    found = rotate(projected[..., 1:9], angles)  # a view, as queries and keys are of their projection
    assert found.dtype == dtype
    expected = _turned(projected[..., 1:9], angles)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    (gradient,) = torch.autograd.grad(found, projected, upstream)
    (wanted,) = torch.autograd.grad(expected, projected, upstream.double())
    torch.testing.assert_close(gradient, wanted, rtol=tolerance, atol=tolerance)


def test_layers_share_cosines_and_sines_and_nothing_else_is_kept() -> None:
    angles = _angles(8)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        for _ in range(2):
            rotate(torch.randn(POSITIONS, 1, HEADS, 8, requires_grad=True), angles)
    assert len(kept) == 4
    assert len({tensor.data_ptr() for tensor in kept}) == 2


def test_other_angles_and_types_get_their_own_cosines() -> None:
    tensor = torch.randn(POSITIONS, 1, HEADS, 8)
    angles = _angles(8)
    there = rotate(tensor, angles)
    torch.testing.assert_close(rotate(there, -angles), tensor)
    half = rotate(tensor.bfloat16(), angles)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), there, rtol=2e-2, atol=2e-2)
