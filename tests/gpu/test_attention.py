"""Kernels for packed rows on a GPU, against attention from its definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_spin.megatron.attention_kernels import kernel_for
from nemo_spin.megatron.compat import varlen_attention
from tests.unit.megatron.test_attention_kernels import dense, seen


def row_of_units() -> Tensor:
    """Three units of a prompt and two or three responses; lengths that no block size divides."""
    segments, end = [], 0
    for prompt, responses in ((301, (130, 77)), (1, (200, 1)), (64, (128, 50, 333))):
        start = end
        segments.append([start, prompt, 0, 0, start, prompt])
        end += prompt
        for response in responses:
            segments.append([end, response, start, prompt, end, response])
            end += response
    return torch.tensor(segments, dtype=torch.int32)


def module(heads: int, groups: int, head_size: int, window: int | None = None) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_spin.megatron.attention import SegmentAttention

    config = TransformerConfig(
        num_layers=1,
        hidden_size=heads * head_size,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=head_size,
        window_size=None if window is None else (window - 1, 0),
    )
    return SegmentAttention(config, 1, None, "self")


def in_window(mask: Tensor, window: int | None) -> Tensor:
    """`mask` with the last `window` of the keys that each query sees; a response follows its prompt."""
    if window is None:
        return mask
    after = mask.flip(1).cumsum(1).flip(1)  # keys from each on that the query sees
    return mask & (after <= window)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["float32", "bf16"]
)
@pytest.mark.parametrize(
    ("heads", "groups", "head_size", "window"),
    [(8, 2, 64, None), (4, 4, 128, None), (4, 1, 96, None), (8, 2, 64, 100)],
    ids=["grouped", "all-heads", "one-group", "window"],
)
def test_a_packed_row(
    dtype: torch.dtype, bound: float, heads: int, groups: int, head_size: int, window: int | None
) -> None:
    segments = row_of_units()
    length = int(segments[:, 1].sum())
    torch.manual_seed(0)
    tensors = [
        torch.randn(length, 1, count, head_size, device="cuda", dtype=dtype, requires_grad=True)
        for count in (heads, groups, groups)
    ]
    weights = torch.randn(length, heads, head_size, device="cuda", dtype=dtype)
    row = module(heads, groups, head_size, window)(*tensors, attention_mask=segments)
    assert row.shape == (length, 1, heads * head_size)
    (row.view_as(weights) * weights).sum().backward()
    exact = [tensor.detach().squeeze(1).double().requires_grad_() for tensor in tensors]
    expected = dense(*exact, in_window(seen(segments, length), window).cuda(), head_size**-0.5)
    (expected * weights.double()).sum().backward()
    assert relative(row.view_as(weights), expected) < bound
    for tensor, reference in zip(tensors, exact, strict=True):
        assert tensor.grad is not None and reference.grad is not None
        assert relative(tensor.grad.squeeze(1), reference.grad) < bound


def test_bfloat16_rows_are_taken_by_one_kernel() -> None:
    if torch.cuda.get_device_capability() < (8, 0) or varlen_attention() is None:
        pytest.skip("wants a GPU from Ampere on and torch 2.11")
    assert kernel_for(torch.empty(1, 1, 1, 128, device="cuda", dtype=torch.bfloat16)) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_no_kernel_keeps_the_scores(dtype: torch.dtype) -> None:
    """A prompt of 4k and two responses of 2k, 8 heads: scores in float32 would be over 1 GiB."""
    heads, prompt, response = 8, 4096, 2048
    segments = torch.tensor(
        [
            [0, prompt, 0, 0, 0, prompt],
            [prompt, response, 0, prompt, prompt, response],
            [prompt + response, response, 0, prompt, prompt + response, response],
        ],
        dtype=torch.int32,
    )
    tensors = [
        torch.randn(prompt + 2 * response, 1, count, 64, device="cuda", dtype=dtype, requires_grad=True)
        for count in (heads, 2, 2)
    ]
    attention = module(heads, 2, 64)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attention(*tensors, attention_mask=segments).sum().backward()
    scores = heads * (prompt**2 + 2 * response * (prompt + response)) * 4
    assert torch.cuda.max_memory_allocated() - before < scores / 4
