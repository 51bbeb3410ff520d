"""Whole steps on a GPU: bfloat16 kernels against float32, and float32 against transformers in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import reference
from tests.distributed.engines import make_engine, one_step
from tests.gpu.models import make_model, make_pairs

pytestmark = pytest.mark.usefixtures("groups")
BETA = 0.1
OPPONENT = -700.0  # of some 110 tokens at ln 512 nats each


def step(model_dir: Path, dtype: torch.dtype, **model: Any) -> dict[str, Any]:
    engine = make_engine(model_dir, dtype=dtype, micro_batch_tokens=1500, **model)
    return one_step(engine, make_pairs(6, opponent=OPPONENT), beta=BETA)


def difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    return float((found["gradients"] - expected["gradients"]).norm() / expected["gradients"].norm())


def test_float32_is_the_reference(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path)
    found = step(model_dir, torch.float32, transformer_impl="local")
    loss, gradients = reference.spin_step(model_dir, make_pairs(6, opponent=OPPONENT), BETA)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    assert found["loss"] == pytest.approx(loss, rel=1e-4)
    assert found["norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("packing", ["shared_prompt", "pairs", "none"])
def test_bfloat16_is_float32_up_to_rounding(tmp_path: Path, packing: str) -> None:
    model_dir = make_model(tmp_path)
    full = step(model_dir, torch.float32, transformer_impl="local", packing=packing)
    half = step(model_dir, torch.bfloat16, transformer_impl="local", packing=packing)
    assert half["parameters"] == {torch.bfloat16} and half["updated"] == {torch.float32}
    assert half["real"] == pytest.approx(full["real"], rel=0.005)
    assert half["loss"] == pytest.approx(full["loss"], rel=0.05)
    assert difference(half, full) < 0.05


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05)], ids=["float32", "bf16"]
)
def test_transformer_engine_computes_what_local_layers_do(
    tmp_path: Path, dtype: torch.dtype, bound: float
) -> None:
    model_dir = make_model(tmp_path)
    local = step(model_dir, dtype, transformer_impl="local")
    fused = step(model_dir, dtype, transformer_impl="transformer_engine")
    assert fused["real"] == pytest.approx(local["real"], rel=bound / 10)
    assert fused["norm"] == pytest.approx(local["norm"], rel=bound)


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise", "mxfp8"])
def test_a_step_with_8_bit_products(tmp_path: Path, recipe: str) -> None:
    from nemo_spin.megatron.fp8 import _CAPABILITIES

    if torch.cuda.get_device_capability() < _CAPABILITIES[recipe]:
        pytest.skip(f"{torch.cuda.get_device_name()} has no products for {recipe}")
    model_dir = make_model(tmp_path)
    half = step(model_dir, torch.bfloat16, transformer_impl="transformer_engine")
    eight = step(
        model_dir, torch.bfloat16, transformer_impl="transformer_engine", fp8="hybrid", fp8_recipe=recipe
    )
    assert eight["real"] == pytest.approx(half["real"], rel=0.02)
    assert 0 < difference(eight, half) < 0.5
    assert eight["updated"] == {torch.float32}
