"""Floating-point operations that a step needs, from real lengths, and what devices could do at most.

`costs.py` predicts from mean lengths; here the lengths are known. Only needed work counts: no
padding, no second copy of a prompt, nothing that is computed again to save memory. The share of
the peak that follows is the "model FLOPs utilization" of Chowdhery et al., arXiv 2204.02311, app. B.
No torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nemo_spin.data.needed_work import Needed
from nemo_spin.megatron.costs import Flops, layer_matmul_parameters
from nemo_spin.megatron.sizes import ModelShape


def forward_flops(shape: ModelShape, needed: Needed) -> Flops:
    """Of one forward pass over `needed`.

    A product of m x k by k x n has 2 m k n operations (Narayanan et al., arXiv 2104.04473, app. A):

        layers      2 W tokens            W: weights a token is multiplied with, of all layers
        attention   4 N D L attended      scores and weighted values, of the pairs that are seen
        head        2 h V response_tokens prompt tokens never meet the vocabulary

    with N heads of D channels, L layers, hidden size h and vocabulary V without padding.
    """
    return Flops(
        layers=2.0 * layer_matmul_parameters(shape) * needed.tokens,
        attention=4.0 * shape.query_size * shape.num_layers * needed.attended,
        head=2.0 * shape.hidden_size * shape.vocab_size * needed.response_tokens,
    )


@dataclass(frozen=True)
class Peak:
    """Most dense operations per second of a device, 10^12, by the type that is multiplied.

    Attributes:
        name: Regular expression that finds it in the name that CUDA reports.
        bf16: With float32 accumulation.
        fp8: None where the device has no such units.
    """

    name: str
    bf16: float
    fp8: float | None


# NVIDIA's data sheets and, for Blackwell, its DGX and GB200 NVL72 pages. They print H100, H200,
# B200 and L4 with sparsity; that is twice the dense figure here. The first match counts.
PEAKS = (
    Peak(r"\bA100\b", 312.0, None),  # A100 data sheet: PCIe and SXM alike
    Peak(r"\bA30\b", 165.0, None),
    Peak(r"\bA40\b", 149.7, None),
    Peak(r"\bH100 PCIe\b", 756.5, 1513.0),  # 1,513 and 3,026 with sparsity
    Peak(r"\bH100 NVL\b", 835.5, 1671.0),  # 1,671 and 3,341 with sparsity
    Peak(r"\bH100\b", 989.5, 1979.0),  # SXM: 1,979 and 3,958 with sparsity
    Peak(r"\bH200 NVL\b", 835.5, 1671.0),
    Peak(r"\bG?H200\b", 989.5, 1979.0),  # H200 SXM, and the GPU of a GH200
    Peak(r"\bGB200\b", 2500.0, 5000.0),  # of one GPU: 5,000 and 10,000 with sparsity
    Peak(r"\bB200\b", 2250.0, 4500.0),  # DGX B200: 72 PFLOP/s FP8 with sparsity, eight GPUs
    Peak(r"\bL40S\b", 362.0, 733.0),
    Peak(r"\bL40\b", 181.0, 362.0),
    Peak(r"\bL4\b", 121.0, 242.5),  # 242 and 485 with sparsity
)


def peak_flops(device_name: str | None, precision: str) -> float | None:
    """Operations per second of a device at most; None where no figure is published here.

    Args:
        device_name: What CUDA calls it; None for a CPU.
        precision: `bf16` or `fp8`. Others have no figure: whether float32 is multiplied as TF32
            is a setting of PyTorch.
    """
    if device_name is None or "MIG" in device_name:  # a slice of a device
        return None
    for peak in PEAKS:
        if re.search(peak.name, device_name):
            value = {"bf16": peak.bf16, "fp8": peak.fp8}.get(precision)
            return None if value is None else value * 1e12
    return None
