"""Output layer and loss over a large vocabulary: without logits, and the plain way.

The plain way is what the peers compute: logits of all response tokens, `log_softmax` in
float32, `gather`. Both get the same hidden states, weight and targets, sum the same
loss over the same pairs, and add the weight's gradient to the same float32 buffer, which
training keeps anyway. Every run is a process of its own; its peak is the most resident
memory during forward and backward, counted in two ways: whole (weight, gradient and
inputs included) and on top of them (what the computation itself needs).
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from examples.benchmarks.measure import PeakMemory, Run, column, ratios, show, spread, summary, take_turns

SUMMARY = "peak memory and time of the output layer with the loss, against plain logits"
_DTYPES = {"32": "float32", "bf16": "bfloat16"}
_BETA = 0.1
_PLAIN, _OURS = "plain", "without logits"
_MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--tokens", type=int, default=4096, help="response tokens of the microbatch")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--response", type=int, default=256, help="tokens of a response")
    parser.add_argument("--precision", nargs="+", choices=list(_DTYPES), default=list(_DTYPES))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures both ways in each precision, and prints them."""
    sizes = (options.vocabulary, options.tokens, options.hidden, options.response)
    results = {}
    for precision in options.precision:
        alternatives = {
            name: (_measure, (name, *sizes, _DTYPES[precision], options.threads)) for name in (_PLAIN, _OURS)
        }
        runs = take_turns(alternatives, options.repeats)
        _check_same(runs, _DTYPES[precision])
        results[precision] = _report(runs, f"{_DTYPES[precision]}, {sizes[1]:,} tokens x {sizes[0]:,} rows")
    return results


def _check_same(runs: dict[str, list[Run]], dtype: str) -> None:
    """Both ways must have computed the same loss and gradient norms."""
    tolerance = {"float32": 1e-5, "bfloat16": 1e-2}[dtype]
    for plain, ours in zip(runs[_PLAIN], runs[_OURS], strict=True):
        for name in ("loss", "hidden_grad_norm", "weight_grad_norm"):
            difference = abs(plain[name] - ours[name]) / abs(plain[name])
            if difference > tolerance:
                raise SystemExit(f"{name} differs by {difference:.2g}: nothing to compare")


def _report(runs: dict[str, list[Run]], title: str) -> dict[str, Any]:
    names = {
        "whole_mib": ("peak MiB, whole", 0),
        "above_mib": ("peak MiB, above weight and gradient", 0),
        "seconds": ("seconds", 2),
        "cpu_seconds": ("CPU seconds", 2),
    }
    rows = [
        [alternative, *(spread(column(runs[alternative], key), digits) for key, (_, digits) in names.items())]
        for alternative in runs
    ]
    found = {name: ratios(runs[_OURS], runs[_PLAIN], name) for name in names}
    rows.append(["ratio", *(spread(found[name], 3) for name in names)])
    show(title, ["", *(heading for heading, _ in names.values())], rows)
    values = {name: {key: summary(column(runs[name], key)) for key in names} for name in runs}
    return {**values, "ratio": {key: summary(found[key]) for key in names}}


def _measure(
    name: str, vocabulary: int, tokens: int, hidden_size: int, response: int, dtype: str, threads: int
) -> Run:
    """One forward and backward pass in this process."""
    import torch
    from torch import distributed

    torch.set_num_threads(threads)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    logps_of = {_PLAIN: _plain, _OURS: _without_logits}[name]
    _step(logps_of, *_inputs(64, 256, 32, dtype), response=8)  # libraries load what they need
    before = PeakMemory.now()
    hidden, weight, targets = _inputs(tokens, vocabulary, hidden_size, dtype)
    PeakMemory.reset()
    held = PeakMemory.now()
    start, cpu_start = time.perf_counter(), time.process_time()
    loss = _step(logps_of, hidden, weight, targets, response=response)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = PeakMemory.peak()
    distributed.destroy_process_group()
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,  # of all threads: what other programs' load changes little
        "whole_mib": (peak - before) / _MIB,
        "above_mib": (peak - held) / _MIB,
        "loss": loss,
        "hidden_grad_norm": float(hidden.grad.double().norm()),
        "weight_grad_norm": float(weight.main_grad.norm()),
    }


def _inputs(tokens: int, vocabulary: int, hidden_size: int, dtype: str) -> tuple[Any, Any, Any]:
    """Hidden states, the weight with its gradient buffer, and targets; the same in every run."""
    import torch

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(getattr(torch, dtype))
    weight = torch.empty(vocabulary, hidden_size, dtype=hidden.dtype)
    for rows in weight.split(1024):  # without a float32 copy of all of it
        rows.copy_(torch.randn(rows.shape, generator=generator) * hidden_size**-0.5)
    weight.requires_grad_()
    weight.main_grad = torch.full(weight.shape, 0.0)  # written, unlike `zeros`: held from now on
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return hidden.requires_grad_(), weight, targets


def _step(logps_of: Any, hidden: Any, weight: Any, targets: Any, *, response: int) -> float:
    """Forward and backward of the SPIN loss of consecutive responses, taken as pairs; the loss."""
    from torch.nn import functional

    sums = logps_of(hidden, weight, targets).view(-1, response).sum(-1)
    loss = functional.softplus(-_BETA * (sums[0::2] - sums[1::2])).mean()
    loss.backward()
    if not getattr(weight, "grad_added_to_main_grad", False):
        weight.main_grad.add_(weight.grad)  # as Megatron's data parallelism does
    weight.grad = None
    return float(loss.detach())


def _plain(hidden: Any, weight: Any, targets: Any) -> Any:
    return (hidden @ weight.t()).float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def _without_logits(hidden: Any, weight: Any, targets: Any) -> Any:
    from nemo_spin.megatron.vocab_parallel import logps_without_logits

    return logps_without_logits(hidden, weight, targets, vocab_size=weight.shape[0], tp_group=None)
