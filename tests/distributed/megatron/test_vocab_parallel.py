"""Vocabulary-parallel log-probabilities and their gradient, against plain float64 autograd."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.harness import run_ranks

TOKENS, HIDDEN = 13, 8


def _case(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = 30.0 * torch.randn(TOKENS, vocab_size, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocab_size, (TOKENS,), generator=generator)
    weights = torch.randn(TOKENS, generator=generator, dtype=torch.float64)
    return logits, targets, weights


def _vocab_parallel(vocab_size: int, padded: int, tensor: int) -> tuple[torch.Tensor, torch.Tensor]:
    from torch import distributed

    from nemo_spin.megatron.runtime import initialize
    from nemo_spin.megatron.vocab_parallel import token_logps

    runtime = initialize(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=1, seed=1)
    logits, targets, weights = _case(vocab_size)
    # padding rows hold what no rank may ever look at
    full = torch.full((TOKENS, padded), 1e4)
    full[:, :vocab_size] = logits.float()
    mine = full.chunk(tensor, dim=-1)[runtime.tp_rank].contiguous().requires_grad_()
    logps = token_logps(mine, targets, vocab_size=vocab_size, tp_group=runtime.tp_group)
    (logps * weights.float()).sum().backward()
    assert mine.grad is not None
    parts = [torch.empty_like(mine.grad) for _ in range(tensor)]
    distributed.all_gather(parts, mine.grad, group=runtime.tp_group)
    return logps.detach(), torch.cat(parts, dim=-1)


@pytest.mark.parametrize(
    ("vocab_size", "padded", "tensor"),
    [(10, 10, 1), (10, 12, 1), (10, 10, 2), (9, 10, 2), (5, 12, 2), (7, 16, 4)],
    ids=["plain", "padded", "split", "split-padded", "a-rank-of-padding", "two-ranks-of-padding"],
)
def test_values_and_gradients(vocab_size: int, padded: int, tensor: int) -> None:
    logps, grad = run_ranks(_vocab_parallel, tensor, vocab_size, padded, tensor)
    logits, targets, weights = _case(vocab_size)
    logits.requires_grad_()
    expected = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    (expected * weights).sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logps.double(), expected.detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(grad[:, :vocab_size].double(), logits.grad, rtol=1e-4, atol=1e-5)
    assert not grad[:, vocab_size:].any(), "rows that pad the vocabulary get no gradient"
