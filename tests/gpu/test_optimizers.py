"""Optimizers on a GPU: Megatron's distributed one with a fused Adam, and tiny steps in bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.engines import make_engine
from tests.gpu.models import make_model

pytestmark = pytest.mark.usefixtures("groups")
STEPS = 20


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_distributed_optimizer_follows_adamw(tmp_path: Path, weight_decay: float) -> None:
    """Fused where Transformer Engine or Apex is there; main weights are those of torch's AdamW."""
    optim = {"name": "adam", "weight_decay": weight_decay}
    engine = make_engine(
        make_model(tmp_path), dtype=torch.float32, distributed_optimizer=True, optim=optim, lr=1e-3
    )
    named = dict(engine.chunks[0].named_parameters())
    plain = {name: weight.detach().clone().requires_grad_() for name, weight in named.items()}
    other = torch.optim.AdamW(
        plain.values(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        for name, weight in named.items():
            gradient = torch.randn(weight.shape, generator=generator).cuda()
            weight.main_grad.copy_(gradient)
            plain[name].grad = gradient
        engine.update(1e-3)
        other.step()
    for name, weight in named.items():
        difference = (weight - plain[name]).norm() / plain[name].norm()
        assert difference < 1e-6, f"{name}: {difference:.2g}"


def test_rmsprop_at_1e_7_moves_bfloat16_weights(tmp_path: Path) -> None:
    engine = make_engine(make_model(tmp_path), dtype=torch.bfloat16, optim={"name": "rmsprop"}, lr=1e-7)
    weight = engine.chunks[0].module.decoder.layers[0].mlp.linear_fc2.weight
    start, main_start = weight.detach().clone(), weight.main_param.detach().clone()
    for _ in range(200):
        for parameter in engine.chunks[0].parameters():
            parameter.main_grad.fill_(1.0)
        engine.update(1e-7)
    assert (weight.main_param - main_start).abs().min() > 200 * 1e-7
    assert (weight != start).any()
