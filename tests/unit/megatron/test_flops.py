"""Operations by hand, against the plan's formula, and the peaks of devices by their CUDA names."""

from __future__ import annotations

import pytest

from nemo_spin.data.needed_work import Needed
from nemo_spin.megatron.costs import unit_flops
from nemo_spin.megatron.flops import PEAKS, forward_flops, peak_flops
from nemo_spin.megatron.sizes import DEVICES, ModelShape, Work

TINY = ModelShape(2, 8, 16, 4, 2, 4, 100)  # query size 16, key size 8


def test_by_hand() -> None:
    needed = Needed(pairs=1, tokens=10, response_tokens=6, repeated_prompt_tokens=4, attended=40)
    flops = forward_flops(TINY, needed)
    weights = 2 * (8 * (16 + 2 * 8) + 16 * 8 + 3 * 8 * 16)  # qkv, output, gate and up and down
    assert weights == 1536
    assert (flops.layers, flops.attention, flops.head) == (2 * 1536 * 10, 4 * 16 * 2 * 40, 2 * 8 * 100 * 6)
    assert flops.total == 30_720 + 5_120 + 9_600
    assert flops.training == 3 * flops.total
    assert flops.training_adapters == 2 * 30_720 + 3 * 5_120 + 2 * 9_600


def test_it_is_what_the_plan_predicts() -> None:
    """The plan leaves out the diagonal: half a key per token of 600."""
    work = Work(prompt=100, real=200, generated=300, longest_unit=600, micro_batch_tokens=600)
    attended = 100 * 101 // 2 + (200 * 201 // 2 + 200 * 100) + (300 * 301 // 2 + 300 * 100)
    flops = forward_flops(TINY, Needed(1, 600, 500, 100, attended))
    predicted = unit_flops(TINY, work)
    assert (flops.layers, flops.head) == (predicted.layers, predicted.head)
    assert flops.attention - predicted.attention == 4 * 16 * 2 * 600 / 2


@pytest.mark.parametrize(
    ("name", "bf16", "fp8"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0, None),
        ("NVIDIA A100 80GB PCIe", 312.0, None),
        ("NVIDIA H100 80GB HBM3", 989.5, 1979.0),
        ("NVIDIA H100 PCIe", 756.5, 1513.0),
        ("NVIDIA H100 NVL", 835.5, 1671.0),
        ("NVIDIA H200", 989.5, 1979.0),
        ("NVIDIA GH200 480GB", 989.5, 1979.0),
        ("NVIDIA B200", 2250.0, 4500.0),
        ("NVIDIA GB200", 2500.0, 5000.0),
        ("NVIDIA L40S", 362.0, 733.0),
        ("NVIDIA L4", 121.0, 242.5),
    ],
)
def test_peaks(name: str, bf16: float, fp8: float | None) -> None:
    assert peak_flops(name, "bf16") == bf16 * 1e12
    assert peak_flops(name, "fp8") == (None if fp8 is None else fp8 * 1e12)


@pytest.mark.parametrize(
    "name", [None, "NVIDIA H20", "AMD Instinct MI300X", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"]
)
def test_devices_without_a_published_figure(name: str | None) -> None:
    assert peak_flops(name, "bf16") is None


def test_float32_has_no_peak() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "32") is None


def test_the_plan_knows_the_same_devices() -> None:
    for device in DEVICES.values():
        name = device.name.split("-")[0]
        assert peak_flops(f"NVIDIA {name}", "bf16") == pytest.approx(device.tflops * 1e12, rel=1e-3)


def test_dense_fp8_is_about_twice_dense_bf16() -> None:
    for peak in PEAKS:
        assert peak.fp8 is None or peak.fp8 == pytest.approx(2 * peak.bf16, rel=0.02)
