"""What needs no ranks: how A is drawn, and the input of a linear that has its norm inside."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nemo_spin.megatron.lora import initial_a
from nemo_spin.megatron.lora_layers import normalised_input


def test_a_is_drawn_as_kaiming_uniform_with_the_square_root_of_5() -> None:
    a = initial_a("7/0/3/q_proj", rank=64, columns=100)
    expected = torch.empty(64, 100)
    nn.init.kaiming_uniform_(expected, a=5**0.5)
    assert a.shape == (64, 100) and a.dtype == torch.float32
    assert float(a.abs().max()) <= 0.1 and float(expected.abs().max()) <= 0.1  # 1 / sqrt(100)
    assert float(a.std()) == pytest.approx(float(expected.std()), rel=0.03)
    assert torch.equal(a, initial_a("7/0/3/q_proj", rank=64, columns=100))
    for other in ("8/0/3/q_proj", "7/1/3/q_proj", "7/0/4/q_proj", "7/0/3/k_proj"):
        assert not torch.equal(a, initial_a(other, rank=64, columns=100))


def test_a_norm_that_is_fused_with_the_linear_is_computed_for_the_adapter_too() -> None:
    """The linears are stand-ins with the attributes of Transformer Engine's, which needs a GPU."""
    inputs = torch.randn(3, 1, 8)
    assert normalised_input(nn.Linear(8, 2), inputs) is inputs
    weight, bias = torch.randn(8), torch.randn(8)
    linear = SimpleNamespace(
        layer_norm_weight=weight, layer_norm_bias=bias, eps=1e-5, zero_centered_gamma=False
    )
    linear.normalization = "RMSNorm"
    scale = (inputs.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(normalised_input(linear, inputs), inputs * scale * weight)
    linear.zero_centered_gamma = True
    torch.testing.assert_close(normalised_input(linear, inputs), inputs * scale * (weight + 1))
    linear.normalization, linear.zero_centered_gamma = "LayerNorm", False
    centred = inputs - inputs.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(normalised_input(linear, inputs), centred * scale * weight + bias)
