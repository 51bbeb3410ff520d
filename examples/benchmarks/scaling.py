"""Whether cost grows as the work does: pairs, lengths, layers, and data-parallel ranks, x1 to x8.

Cost is CPU seconds of a training step (forward, backward, update), over those of the smallest step; work is
the operations of all matrix products with weights (`megatron/flops.py`), attention's left out: its
grow with the square of the lengths. So cost over work is given with attention and without: what
PyTorch's profiler counts inside the attention operators is taken off; it counts by the clock, so nothing
else may run. One thread for each rank.

Data-parallel ranks are processes over gloo that share out one global batch of chat-like pairs. Cost
is the CPU seconds of all ranks together, and of the busiest rank times their number.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from examples.benchmarks.chat_lengths import chat_pairs, random_pairs
from examples.benchmarks.measure import Run, column, in_a_process, ratios, show, spread, summary
from examples.benchmarks.small_llama import engine_of, write_llama

SUMMARY = "cost of a training step over pairs, lengths, layers and data-parallel ranks"
_AXES = ("pairs", "length", "layers")
_VOCABULARY = 2048
_ATTENTION = "scaled_dot_product"  # in the names of the operators


@dataclass(frozen=True)
class Step:
    """The size of a step: pairs of three runs of `length` tokens through a model of `layers`."""

    pairs: int
    length: int
    layers: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes of the smallest step."""
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--length", type=int, default=100, help="tokens of a prompt, and of each response")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rank-pairs", type=int, default=64, help="of the batch that ranks share out")
    parser.add_argument("--scale", type=float, default=1.0, help="factor for the lengths of those pairs")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures all steps in turns, and prints two tables."""
    results = _report_steps(in_a_process(_measure, options), options)
    ranks: dict[int, list[Run]] = {number: [] for number in options.ranks}
    with tempfile.TemporaryDirectory() as directory:
        write_llama(Path(directory), **_sizes(options, options.layers))
        for _ in range(options.repeats):
            for number in options.ranks:
                ranks[number].append(_in_ranks(number, Path(directory), options))
    return results | {"ranks": _report_ranks(ranks, options)}


def _sizes(options: argparse.Namespace, layers: int) -> dict[str, int]:
    return {"vocabulary": _VOCABULARY, "hidden": options.hidden, "layers": layers}


# ---- one rank ----


def steps_of(options: argparse.Namespace) -> dict[str, dict[int, Step]]:
    """For each axis the steps by factor; the smallest is the same in all."""
    least = {"pairs": options.pairs, "length": options.length, "layers": options.layers}
    return {
        axis: {factor: Step(**{**least, axis: least[axis] * factor}) for factor in options.factors}
        for axis in _AXES
    }


def _measure(options: argparse.Namespace) -> dict[Step, list[Run]]:
    """Every different step in every turn, in this process, on one thread."""
    import torch

    torch.set_num_threads(1)
    steps = list(dict.fromkeys(step for each in steps_of(options).values() for step in each.values()))
    runs: dict[Step, list[Run]] = {step: [] for step in steps}
    with tempfile.TemporaryDirectory() as directory:
        for layers in {step.layers for step in steps}:
            write_llama(Path(directory, str(layers)), **_sizes(options, layers))
        for turn in range(1 + options.repeats):
            for step in steps[:1] if turn == 0 else steps:  # libraries load what they need
                engine = _engine(Path(directory, str(step.layers)), options)
                found = _profiled(engine, step, Path(directory, str(step.layers)))
                if turn:
                    runs[step].append(found)
    return runs


def _engine(model: Path, options: argparse.Namespace) -> Any:
    from nemo_spin.config.schema import OptimConfig
    from nemo_spin.data.packing import Layout

    engine = engine_of(model, optim=OptimConfig(name="adam"))
    engine.layout = Layout("shared_prompt", options.micro_batch_tokens, 1)
    return engine


def _profiled(engine: Any, step: Step, model: Path) -> Run:
    """One step's CPU seconds, those inside attention, and its work."""
    from torch.profiler import ProfilerActivity, profile

    from nemo_spin.bridge.families import architecture_of
    from nemo_spin.data.datasets import Units
    from nemo_spin.data.needed_work import NeededWork
    from nemo_spin.megatron.flops import forward_flops
    from nemo_spin.megatron.sizes import shape_of

    sizes = np.full((step.pairs, 3), step.length)
    units = Units(random_pairs(sizes, vocabulary=_VOCABULARY, generator=np.random.default_rng(0)))
    indices = np.arange(units.num_units)
    _train(engine, units, indices)  # touches memory for the first time, which costs more than using it
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        seconds = _train(engine, units, indices)
    flops = forward_flops(shape_of(architecture_of(model)), NeededWork(units).of(indices))
    inside = (event for event in profiler.events() if _is_attention(event))
    attention = sum(event.cpu_time_total for event in inside) / 1e6
    return {
        "cpu_seconds": seconds,
        "without_attention": seconds - attention,
        "work": flops.layers + flops.head,
    }


def _is_attention(event: Any) -> bool:
    """Whether an operator is attention's and inside of none that is."""
    return _ATTENTION in event.name and (event.cpu_parent is None or _ATTENTION not in event.cpu_parent.name)


def _train(engine: Any, units: Any, indices: np.ndarray) -> float:
    """CPU seconds of this process for a step."""
    from nemo_spin.megatron.forward_step import SPIN_SUMS, spin_loss
    from nemo_spin.objective.objective import build_objective

    loss = partial(spin_loss, objective=build_objective(loss="logistic", beta=0.1))
    start = time.process_time()
    engine.backward(units, indices, loss=loss, names=SPIN_SUMS)
    engine.update(1e-6)
    return time.process_time() - start


def _report_steps(runs: dict[Step, list[Run]], options: argparse.Namespace) -> dict[str, Any]:
    rows, results = [], {}
    for axis, steps in steps_of(options).items():
        least = runs[steps[min(steps)]]
        results[axis] = {}
        for factor, step in steps.items():
            turns = runs[step]
            work = turns[0]["work"] / least[0]["work"]
            costs = {key: ratios(turns, least, key) for key in ("cpu_seconds", "without_attention")}
            over = {key: [value / work for value in values] for key, values in costs.items()}
            results[axis][str(factor)] = {
                "work": work,
                "cpu_seconds": summary(column(turns, "cpu_seconds")),
                "cost": summary(costs["cpu_seconds"]),
                "cost_over_work": summary(over["cpu_seconds"]),
                "without_attention": summary(over["without_attention"]),
            }
            shown = (over["cpu_seconds"], over["without_attention"])
            seconds = spread(column(turns, "cpu_seconds"))
            rows.append([f"{axis} x{factor}", f"{work:.2f}", seconds, *map(spread, shown)])
    headings = ["", "work", "CPU seconds", "cost / work", "attention aside"]
    title = f"{options.pairs} pairs of 3 x {options.length} tokens, {options.layers} layers"
    show(f"{title}, hidden {options.hidden} and more; {options.repeats} turns", headings, rows)
    return results


# ---- several ranks ----


def _in_ranks(number: int, model: Path, options: argparse.Namespace) -> Run:
    """A step by `number` data-parallel ranks."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with ProcessPoolExecutor(number, mp_context=multiprocessing.get_context("spawn")) as processes:
        started = [processes.submit(_rank, rank, number, port, model, options) for rank in range(number)]
        seconds = [each.result() for each in started]
    return {"all_ranks": sum(seconds), "busiest": max(seconds) * number}


def _rank(rank: int, number: int, port: int, model: Path, options: argparse.Namespace) -> float:
    """One rank's CPU seconds."""
    import torch

    from nemo_spin.data.datasets import Units

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in place.items()}})
    torch.set_num_threads(1)
    engine = _engine(model, options)
    units = Units(chat_pairs(options.rank_pairs, vocabulary=_VOCABULARY, scale=options.scale))
    indices = np.arange(units.num_units)
    _train(engine, units, indices)
    return _train(engine, units, indices)


def _report_ranks(runs: dict[int, list[Run]], options: argparse.Namespace) -> dict[str, Any]:
    least = runs[min(runs)]
    rows, results = [], {}
    for number, turns in runs.items():
        costs = {key: ratios(turns, least, key) for key in ("all_ranks", "busiest")}
        results[str(number)] = {
            "cpu_seconds": summary(column(turns, "all_ranks")),
            **{key: summary(values) for key, values in costs.items()},
        }
        seconds = spread(column(turns, "all_ranks"))
        rows.append([str(number), seconds, *(spread(values) for values in costs.values())])
    title = f"{options.rank_pairs} chat-like pairs shared out; {options.repeats} turns"
    show(title, ["ranks", "CPU seconds of all", "all / one rank", "busiest x ranks / one rank"], rows)
    return results
