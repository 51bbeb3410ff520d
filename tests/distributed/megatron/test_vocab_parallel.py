"""The head without logits: values and both gradients, against plain float64 autograd through logits."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.harness import run_ranks

TOKENS, HIDDEN = 13, 8


def _case(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(vocab_size)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = 3.0 * torch.randn(vocab_size, HIDDEN, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocab_size, (TOKENS,), generator=generator)
    factors = torch.randn(TOKENS, generator=generator, dtype=torch.float64)
    return hidden, weight, targets, factors


def _without_logits(
    vocab_size: int, padded: int, tensor: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from torch import distributed

    from nemo_spin.megatron import vocab_parallel
    from nemo_spin.megatron.runtime import initialize

    runtime = initialize(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=1, seed=1)
    vocab_parallel._LOGITS_PER_BLOCK = 20  # several blocks both ways, the last ones short
    vocab_parallel._TOKENS_PER_BLOCK = 5
    hidden, weight, targets, factors = (tensor.to(runtime.device) for tensor in _case(vocab_size))
    # padding rows hold what no rank may ever look at
    full = torch.full((padded, HIDDEN), 1e4, dtype=dtype, device=runtime.device)
    full[:vocab_size] = weight.to(dtype)
    mine = full.chunk(tensor)[runtime.tp_rank].clone().requires_grad_()
    hidden = hidden.to(dtype).requires_grad_()
    logps = vocab_parallel.logps_without_logits(
        hidden, mine, targets, vocab_size=vocab_size, tp_group=runtime.tp_group
    )
    assert logps.dtype == torch.float32
    (logps * factors.float()).sum().backward()
    assert mine.grad is not None and hidden.grad is not None
    distributed.all_reduce(hidden.grad, group=runtime.tp_group)
    parts = [torch.empty_like(mine.grad) for _ in range(tensor)]
    distributed.all_gather(parts, mine.grad, group=runtime.tp_group)
    return logps.detach(), hidden.grad, torch.cat(parts)


@pytest.mark.parametrize(
    ("vocab_size", "padded", "tensor"),
    [(10, 10, 1), (10, 12, 1), (10, 10, 2), (9, 10, 2), (5, 12, 2), (7, 16, 4)],
    ids=["plain", "padded", "split", "split-padded", "a-rank-of-padding", "two-ranks-of-padding"],
)
@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"),
    [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 2e-2, 0.15)],
    ids=["fp32", "bf16"],
)
def test_values_and_gradients(
    vocab_size: int, padded: int, tensor: int, dtype: torch.dtype, rtol: float, atol: float
) -> None:
    logps, grad_hidden, grad_weight = run_ranks(_without_logits, tensor, vocab_size, padded, tensor, dtype)
    hidden, weight, targets, factors = _case(vocab_size)
    hidden = hidden.to(dtype).double().requires_grad_()
    weight = weight.to(dtype).double().requires_grad_()
    expected = (hidden @ weight.t()).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    (expected * factors).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    torch.testing.assert_close(logps.double(), expected.detach(), rtol=rtol, atol=atol)
    torch.testing.assert_close(grad_hidden.double(), hidden.grad, rtol=rtol, atol=atol)
    torch.testing.assert_close(grad_weight[:vocab_size].double(), weight.grad, rtol=rtol, atol=atol)
    assert not grad_weight[vocab_size:].any(), "rows that pad the vocabulary get no gradient"


def _into_main_grad(dtype: torch.dtype, tied: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two microbatches through Megatron's data parallelism, which reduces while backward runs.

    Returns what the buffer held before and after, and the gradient of one microbatch by autograd.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig
    from torch import nn

    from nemo_spin.megatron.runtime import initialize
    from nemo_spin.megatron.vocab_parallel import logps_without_logits

    runtime = initialize(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, seed=1)
    hidden, weight, targets, factors = (tensor.to(runtime.device) for tensor in _case(10))
    hidden, weight = hidden.to(dtype), weight.to(dtype)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight.clone())
            if tied:  # as Megatron marks a weight that is the embedding of its stage too
                self.weight.zero_out_wgrad = True

        def forward(self) -> torch.Tensor:
            states = nn.functional.embedding(targets, self.weight) if tied else hidden
            logps = logps_without_logits(
                states, self.weight, targets, vocab_size=10, tp_group=runtime.tp_group
            )
            return (logps * factors.float()).sum()

    alone = Model()
    alone().backward()
    wrapped = DistributedDataParallel(
        config=TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=1),
        ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=True),
        module=Model(),
    )
    main_grad = wrapped.module.weight.main_grad
    main_grad.fill_(64.0)  # float32 holds what is added to it, bfloat16 would not
    before = main_grad.clone()
    with wrapped.no_sync():
        wrapped().backward()
    wrapped().backward()
    wrapped.finish_grad_sync()
    assert main_grad.dtype == torch.float32 and wrapped.module.weight.grad is None
    assert alone.weight.grad is not None
    return before, main_grad.clone(), alone.weight.grad


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)], ids=str)
def test_the_weights_gradient_is_summed_in_megatrons_float32_buffer(
    dtype: torch.dtype, rtol: float, tied: bool
) -> None:
    before, after, gradient = run_ranks(_into_main_grad, 1, dtype, tied)
    torch.testing.assert_close(after - before, 2 * gradient.float(), rtol=rtol, atol=rtol)


def _frozen() -> tuple[torch.Tensor | None, torch.Tensor]:
    from nemo_spin.megatron.runtime import initialize
    from nemo_spin.megatron.vocab_parallel import logps_without_logits

    runtime = initialize(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, seed=1)
    hidden, weight, targets, _ = (tensor.to(runtime.device) for tensor in _case(10))
    hidden, weight = hidden.float().requires_grad_(), weight.float()
    logps_without_logits(hidden, weight, targets, vocab_size=10, tp_group=runtime.tp_group).sum().backward()
    assert hidden.grad is not None
    return weight.grad, hidden.grad


def test_a_frozen_weight_has_no_gradient() -> None:
    weight_grad, grad = run_ranks(_frozen, 1)
    hidden, weight, targets, _ = _case(10)
    hidden.requires_grad_()
    (hidden @ weight.t()).log_softmax(-1).gather(-1, targets[:, None]).sum().backward()
    assert weight_grad is None
    assert hidden.grad is not None
    torch.testing.assert_close(grad.double(), hidden.grad, rtol=1e-5, atol=1e-5)
