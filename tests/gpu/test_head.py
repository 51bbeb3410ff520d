"""Memory of the output layer and the log-softmax on a GPU, against logits and `log_softmax`."""

from __future__ import annotations

import pytest
import torch

from nemo_spin.megatron.vocab_parallel import logps_without_logits

pytestmark = pytest.mark.usefixtures("groups")
VOCABULARY, HIDDEN, TOKENS = 128 * 1024, 512, 4096


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (0.02 * torch.randn(VOCABULARY, HIDDEN, device="cuda")).bfloat16().requires_grad_()
    return hidden, weight, torch.randint(0, VOCABULARY, (TOKENS,), device="cuda")


def peak_of(action: object) -> int:
    assert callable(action)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    action()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_memory_is_an_eighth_and_values_agree() -> None:
    from nemo_spin.megatron.runtime import initialize

    runtime = initialize(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, seed=1)
    hidden, weight, targets = inputs()
    results: dict[str, torch.Tensor] = {}

    def plain() -> None:
        logits = (hidden @ weight.t()).float()
        results["plain"] = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
        results["plain"].sum().backward()

    def ours() -> None:
        results["ours"] = logps_without_logits(
            hidden, weight, targets, vocab_size=VOCABULARY, tp_group=runtime.tp_group
        )
        results["ours"].sum().backward()

    peaks, gradients = {}, {}
    for name, action in (("plain", plain), ("ours", ours)):
        hidden.grad = weight.grad = None
        peaks[name] = peak_of(action)
        assert hidden.grad is not None
        gradients[name] = hidden.grad.float()
        results[name] = results[name].detach()
    assert peaks["ours"] <= peaks["plain"] / 8, peaks
    torch.testing.assert_close(results["ours"], results["plain"], rtol=1e-2, atol=1e-2)
    difference = (gradients["ours"] - gradients["plain"]).norm() / gradients["plain"].norm()
    assert difference < 0.02
