"""Windows and caps of the core attention, against scores written out in float64."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_spin.megatron.attention import SegmentAttention

HEADS, GROUPS, CHANNELS, POSITIONS = 4, 2, 6, 9


def _attention(window: int | None, cap: float | None) -> SegmentAttention:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=HEADS * CHANNELS,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        window_size=None if window is None else (window - 1, 0),
        window_attn_skip_freq=None if window is None else [0, 1],
    )
    return SegmentAttention(config, 2, None, "self", softmax_scale=0.3, logit_cap=cap)


def _expected(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, cap: float | None
) -> torch.Tensor:
    """One position after another: [S, heads * channels]."""
    rows = []
    for position in range(len(query)):
        first = 0 if window is None else max(0, position - window + 1)
        heads = []
        for head in range(HEADS):
            seen = slice(first, position + 1)
            scores = key[seen, head // 2] @ query[position, head] * 0.3
            scores = scores if cap is None else cap * torch.tanh(scores / cap)
            heads.append(scores.softmax(0) @ value[seen, head // 2])
        rows.append(torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 4, 20])
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_response_sees_as_far_back_as_if_it_followed_its_prompt(
    is_packed: bool, window: int | None, cap: float | None
) -> None:
    torch.manual_seed(2)
    shapes = [(POSITIONS, HEADS), (POSITIONS, GROUPS), (POSITIONS, GROUPS)]
    inputs = [torch.randn(*shape, CHANNELS, dtype=torch.float64, requires_grad=True) for shape in shapes]
    # a prompt of 4, the last 5 positions being its response
    segments = torch.tensor([[0, 4, 0, 0, 0, 4], [4, 5, 0, 4, 4, 5]], dtype=torch.int32)
    output = _attention(window, cap)(*(x[:, None] for x in inputs), segments if is_packed else None)[:, 0]
    expected = _expected(*inputs, window, cap)
    assert (output - expected).abs().max() < (1e-12 if cap is None else 1e-6)  # capped in float32
    weights = torch.randn_like(expected)
    computed = torch.autograd.grad((output * weights).sum(), inputs)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    for gradient, other in zip(computed, wanted, strict=True):
        assert (gradient - other).abs().max() < (1e-12 if cap is None else 1e-5)


def test_a_layer_without_a_window_sees_everything() -> None:
    attention = _attention(3, None)
    assert attention.window == 3
    other = SegmentAttention(attention.config, 1, None, "self")
    assert other.window is None
