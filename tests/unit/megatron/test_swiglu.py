"""SwiGLU's values and gradients, against PyTorch's own, and what it keeps for them."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from nemo_spin.megatron.swiglu import SwiGLU


@pytest.fixture
def swiglu() -> SwiGLU:
    return SwiGLU(TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_two_operations_to_the_last_bit(
    swiglu: SwiGLU, dtype: torch.dtype
) -> None:
    torch.manual_seed(5)
    inputs = (3 * torch.randn(7, 2, 12)).to(dtype).requires_grad_()
    upstream = torch.randn(7, 2, 6).to(dtype)
    found = swiglu(inputs)
    gate, up = inputs.chunk(2, dim=-1)
    expected = functional.silu(gate) * up
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(value, inputs, upstream)[0] for value in (found, expected)]
    assert torch.equal(*gradients)


def test_the_gate_by_hand(swiglu: SwiGLU) -> None:
    """silu(ln 3) = ln 3 * 3/4, whose derivative is 3/4 + ln 3 * 3/16."""
    gate = torch.tensor(3.0, dtype=torch.float64).log()
    inputs = torch.stack([gate, torch.tensor(2.0, dtype=torch.float64)]).requires_grad_()
    found = swiglu(inputs)
    assert found.item() == pytest.approx(gate.item() * 1.5)
    (gradient,) = torch.autograd.grad(found.sum(), inputs)
    assert gradient.tolist() == pytest.approx([2 * (0.75 + gate.item() * 3 / 16), gate.item() * 0.75])


def test_it_keeps_its_input_alone_and_leaves_it_alone(swiglu: SwiGLU) -> None:
    inputs = torch.randn(5, 8, requires_grad=True)
    before = inputs.detach().clone()
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        found = swiglu(inputs)
    assert [tuple(tensor.shape) for tensor in kept] == [(5, 8)]
    upstream = torch.ones(5, 4)
    torch.autograd.grad(found, inputs, upstream)
    assert torch.equal(inputs, before)
    assert torch.equal(upstream, torch.ones(5, 4))
