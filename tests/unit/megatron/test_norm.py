"""RMSNorm's values and gradients, against autograd in float64, and what it keeps for them."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.autograd.graph import saved_tensors_hooks

from nemo_spin.megatron.norm import RMSNorm

SIZE, EPS = 6, 1e-3


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Megatron's layers put their weights."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))


def _norm(dtype: torch.dtype, *, zero_centered: bool) -> RMSNorm:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=SIZE,
        num_attention_heads=1,
        params_dtype=dtype,
        layernorm_zero_centered_gamma=zero_centered,
    )
    norm = RMSNorm(config, SIZE, eps=EPS)
    torch.nn.init.normal_(norm.weight)
    return norm


def _expected(x: torch.Tensor, weight: torch.Tensor, zero_centered: bool) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * (weight + 1 if zero_centered else weight)


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_values_and_gradients(dtype: torch.dtype, tolerance: float, zero_centered: bool) -> None:
    torch.manual_seed(3)
    norm = _norm(dtype, zero_centered=zero_centered)
    x = torch.randn(4, 2, SIZE).to(dtype).requires_grad_()
    upstream = torch.randn(4, 2, SIZE).to(dtype)
    found = norm(x)
    assert found.dtype == dtype
    gradients = torch.autograd.grad(found, (x, norm.weight), upstream)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, norm.weight)]
    expected = _expected(*exact, zero_centered)
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    for one, other in ((found, expected), *zip(gradients, wanted, strict=True)):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


def test_a_weight_that_is_not_trained_gets_no_gradient() -> None:
    norm = _norm(torch.float32, zero_centered=False).requires_grad_(False)
    x = torch.randn(3, SIZE, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None
    assert norm.weight.grad is None


def test_beside_its_input_it_keeps_a_number_for_each_row() -> None:
    norm = _norm(torch.bfloat16, zero_centered=False)
    x = torch.randn(5, SIZE).bfloat16().requires_grad_()
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        norm(x)
    assert [tuple(tensor.shape) for tensor in kept] == [(5, SIZE), (SIZE,), (5, 1)]
