from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nemo_spin.megatron.attention_kernels import (
    VariableLengths,
    kernel_for,
    row_attention,
    variable_lengths,
)

CPU = torch.device("cpu")
# A prompt of 3 with responses of 2 and 1, then a prompt of 2 with a response of 2.
UNITS = torch.tensor(
    [
        [0, 3, 0, 0, 0, 3],
        [3, 2, 0, 3, 3, 2],
        [5, 1, 0, 3, 5, 1],
        [6, 2, 0, 0, 6, 2],
        [8, 2, 6, 2, 8, 2],
    ],
    dtype=torch.int32,
)
# Queries of one rank of a row that is split: the end of a response, then the start of the next.
SHARE = torch.tensor([[0, 2, 0, 4, 4, 5], [2, 1, 0, 4, 9, 1]], dtype=torch.int32)


def seen(segments: Tensor, keys: int) -> Tensor:
    """[T, S] bool, one query at a time: what each may look at."""
    rows = []
    for _, count, prefix, prefix_count, run, run_count in segments.tolist():
        for query in range(count):
            row = torch.zeros(keys, dtype=torch.bool)
            row[prefix : prefix + prefix_count] = True
            row[run : run + run_count - count + query + 1] = True
            rows.append(row)
    return torch.stack(rows)


def one_by_one(
    query: Tensor, key: Tensor, value: Tensor, lengths: VariableLengths, softmax_scale: float
) -> Tensor:
    """What a variable-length kernel promises, written out; stands in for a GPU's."""
    results = []
    for index in range(len(lengths.cu_seqlens_q) - 1):
        q = query[lengths.cu_seqlens_q[index] : lengths.cu_seqlens_q[index + 1]]
        span = slice(int(lengths.cu_seqlens_kv[index]), int(lengths.cu_seqlens_kv[index + 1]))
        mask = torch.ones(len(q), span.stop - span.start, dtype=torch.bool).tril(
            span.stop - span.start - len(q)
        )
        results.append(dense(q, key[span], value[span], mask, softmax_scale))
    return torch.cat(results)


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, softmax_scale: float) -> Tensor:
    """Attention from its definition, with a mask [T, S] and G key heads for N query heads."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = torch.einsum("tnd,snd->nts", query, key) * softmax_scale
    return torch.einsum("nts,snd->tnd", scores.masked_fill(~mask, float("-inf")).softmax(-1), value)


def test_the_keys_of_a_response_are_its_prompt_and_itself() -> None:
    lengths = variable_lengths(UNITS, CPU)
    assert lengths.keys.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 6, 7, 8, 9]
    assert lengths.cu_seqlens_q.tolist() == [0, 3, 5, 6, 8, 10]
    assert lengths.cu_seqlens_kv.tolist() == [0, 3, 8, 12, 14, 18]
    assert (lengths.max_seqlen_q, lengths.max_seqlen_kv) == (3, 5)
    assert lengths.keys.dtype == torch.int64
    assert lengths.cu_seqlens_q.dtype == lengths.cu_seqlens_kv.dtype == torch.int32


def test_the_keys_of_a_share_begin_before_its_queries() -> None:
    lengths = variable_lengths(SHARE, CPU)
    assert lengths.keys.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2, 3, 9]
    assert lengths.cu_seqlens_q.tolist() == [0, 2, 3]
    assert lengths.cu_seqlens_kv.tolist() == [0, 9, 14]


def test_all_layers_of_a_microbatch_share_one_description() -> None:
    assert variable_lengths(UNITS, CPU) is variable_lengths(UNITS.clone(), CPU)
    assert variable_lengths(UNITS, CPU) is not variable_lengths(UNITS[:3], CPU)


@pytest.mark.parametrize("segments", [UNITS, SHARE], ids=["units", "share"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_attention_and_its_gradients_are_those_of_a_dense_mask(segments: Tensor, groups: int) -> None:
    torch.manual_seed(0)
    queries = int(segments[:, 1].sum())
    query = torch.randn(queries, 4, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(10, groups, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = torch.randn(queries, 4, 8, dtype=torch.float64)
    tensors = (query, key, value)
    ours = row_attention(query, key, value, segments=segments, softmax_scale=0.3, kernel=one_by_one)
    expected = dense(query, key, value, seen(segments, 10), 0.3)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    ours_gradients = torch.autograd.grad((ours * weights).sum(), tensors)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), tensors)
    for found, wanted in zip(ours_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("segments", [UNITS, SHARE], ids=["units", "share"])
def test_a_variable_length_kernel_takes_the_place_of_one_segment_at_a_time(
    segments: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_spin.megatron import attention

    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2, kv_channels=8
    )
    module = attention.SegmentAttention(config, 1, None, "self")
    torch.manual_seed(0)
    query = torch.randn(int(segments[:, 1].sum()), 1, 4, 8)
    key, value = (torch.randn(10, 1, 2, 8) for _ in range(2))
    expected = module(query, key, value, attention_mask=segments)
    monkeypatch.setattr(attention, "kernel_for", lambda query, window: one_by_one)
    row = module(query, key, value, attention_mask=segments)
    assert row.shape == (len(query), 1, 32)
    torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-6)


def test_the_gpu_kernel_is_not_offered_on_the_cpu() -> None:
    assert kernel_for(torch.zeros(1, 4, 64, dtype=torch.bfloat16)) is None
