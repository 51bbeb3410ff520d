"""Where the time of a training step goes: PyTorch's profiler over steps of packed chat-like pairs.

Prints the operators with the most time of their own, and writes a trace for chrome://tracing or
https://ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from examples.benchmarks.chat_lengths import chat_pairs
from examples.benchmarks.measure import in_a_process, show
from examples.benchmarks.small_llama import engine_of, write_llama

SUMMARY = "operators of a training step by their time, and a trace"
_SHOWN = 15


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes of model and batch."""
    parser.add_argument("--pairs", type=int, default=16, help="of a step")
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--scale", type=float, default=1.0, help="factor for all lengths")
    parser.add_argument("--trace", type=Path, default=Path("runs", "benchmarks", "step.trace.json"))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Profiles `--repeats` steps after one that is not, and prints a table."""
    options.trace.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = in_a_process(_profile, options)
    rows = [
        [name, f"{value['share']:.1%}", f"{value['seconds']:.3f}", f"{value['calls']:,}"]
        for name, value in list(found["operators"].items())[:_SHOWN]
    ]
    title = f"{found['seconds']:.2f} s of operators in {options.repeats} steps of {options.pairs} pairs"
    show(title, ["", "share", "seconds", "calls"], rows)
    print(f"trace: {options.trace}")
    return found


def _profile(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from torch.profiler import ProfilerActivity, profile

    from nemo_spin.config.schema import OptimConfig
    from nemo_spin.data.datasets import Units
    from nemo_spin.data.packing import Layout
    from nemo_spin.megatron.forward_step import SPIN_SUMS, spin_loss
    from nemo_spin.objective.objective import build_objective

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as directory:
        sizes = {"vocabulary": options.vocabulary, "hidden": options.hidden, "layers": options.layers}
        engine = engine_of(write_llama(Path(directory), **sizes), optim=OptimConfig(name="adam"))
    engine.layout = Layout("shared_prompt", options.micro_batch_tokens, 1)
    units = Units(chat_pairs(options.pairs, vocabulary=options.vocabulary, scale=options.scale))
    loss = partial(spin_loss, objective=build_objective(loss="logistic", beta=0.1))

    def step() -> None:
        engine.backward(units, np.arange(options.pairs), loss=loss, names=SPIN_SUMS)
        engine.update(1e-6)

    step()  # libraries load what they need
    has_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if has_gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(options.repeats):
            step()
    profiler.export_chrome_trace(str(options.trace))
    return _by_own_time(profiler.key_averages(), has_gpu=has_gpu)


def _by_own_time(averages: Any, *, has_gpu: bool) -> dict[str, Any]:
    """Operators with seconds of their own (on the GPU where there is one), the longest first."""
    name = "self_device_time_total" if has_gpu else "self_cpu_time_total"
    times = {entry.key: (getattr(entry, name) / 1e6, int(entry.count)) for entry in averages}
    total = sum(seconds for seconds, _ in times.values())
    ordered = sorted(times.items(), key=lambda item: -item[1][0])
    operators = {
        key: {"seconds": seconds, "share": seconds / total, "calls": calls}
        for key, (seconds, calls) in ordered
        if seconds > 0
    }
    return {"seconds": total, "operators": operators}
