"""Useful tokens per second of the ways to lay out a global batch of chat-like pairs.

Useful are a prompt's tokens once and those of every response; what else is computed,
copies of prompts and padding, is waste. The alternatives take the same model, the same
pairs and the same gradient, in one process, in turns: the three values of
`model.packing`, and every sequence padded to the longest of the batch. How full rows are
and how evenly data-parallel ranks are loaded is counted over more batches, for several
`micro_batch_tokens`, without computing.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from examples.benchmarks.chat_lengths import chat_pairs
from examples.benchmarks.measure import Run, column, in_a_process, ratios, show, spread, summary
from examples.benchmarks.small_llama import engine_of, write_llama
from nemo_spin.data.datasets import Units
from nemo_spin.data.packing import PACKINGS, Layout

SUMMARY = "useful tokens per second of the packing modes and of plain padding"
_LONGEST = "padded to the longest"
_VOCABULARY = 4096
_BUDGETS = (2048, 4096, 8192, 16384)
_RANKS = (1, 8)
_MULTIPLES = (1, 16)  # 16: sequence parallelism over 4 ranks and context parallelism over 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes of the batch and of the model."""
    parser.add_argument("--pairs", type=int, default=64, help="of a global batch")
    parser.add_argument("--micro-batch-tokens", type=int, default=8192, help="of a packed row")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="pairs of a padded microbatch")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of lengths and tokens")
    parser.add_argument("--scale", type=float, default=1.0, help="factor for all lengths")
    parser.add_argument("--batches", type=int, default=32, help="batches that are counted, not computed")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures, counts, and prints three tables."""
    runs = in_a_process(_measure, options)
    _check_same(runs)
    return {"computed": _report_speed(runs), "counted": _report_counts(options)}


def layouts(options: argparse.Namespace, units: Units) -> dict[str, Layout]:
    """The alternatives; the longest sequence of the batch is a multiple of itself and of no shorter one."""
    prompt, longest_response = units.token_counts()[:, 0], _longest_responses(units)
    sizes = (options.micro_batch_tokens, options.micro_batch_size)
    found = {packing: Layout(packing, *sizes) for packing in PACKINGS}
    found[_LONGEST] = Layout("none", *sizes, pad_to_multiple=int((prompt + longest_response).max()))
    return found


def _longest_responses(units: Units) -> np.ndarray:
    return np.array([max(map(len, units.responses(unit))) for unit in range(units.num_units)])


# ---- computed ----


def _measure(options: argparse.Namespace) -> dict[str, list[Run]]:
    """Loss, gradient norm, slots and seconds of every alternative in every turn, in this process."""
    import torch

    torch.set_num_threads(options.threads)
    units = Units(chat_pairs(options.pairs, vocabulary=_VOCABULARY, seed=options.seed, scale=options.scale))
    with tempfile.TemporaryDirectory() as directory:
        sizes = {"hidden": options.hidden, "layers": options.layers}
        engine = engine_of(write_llama(Path(directory), vocabulary=_VOCABULARY, **sizes))
    alternatives = layouts(options, units)
    runs: dict[str, list[Run]] = {name: [] for name in alternatives}
    _step(engine, alternatives["shared_prompt"], units)  # libraries load what they need
    for _ in range(options.repeats):
        for name, layout in alternatives.items():
            runs[name].append(_step(engine, layout, units))
    return runs


def _step(engine: Any, layout: Layout, units: Units) -> Run:
    """Forward and backward of one global batch."""
    from functools import partial

    from nemo_spin.megatron.forward_step import SPIN_SUMS, spin_loss
    from nemo_spin.objective.objective import build_objective

    engine.layout = layout
    indices = np.arange(units.num_units)
    loss = partial(spin_loss, objective=build_objective(loss="logistic", beta=0.1))
    start, cpu_start = time.perf_counter(), time.process_time()
    sums = engine.backward(units, indices, loss=loss, names=SPIN_SUMS)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    useful = useful_tokens(units, indices)
    [loads] = row_slots(layout, units, indices, dp_size=1)
    gradients = [parameter.main_grad for chunk in engine.chunks for parameter in chunk.parameters()]
    return {
        "seconds": seconds,
        "useful_per_second": useful / seconds,
        "useful_per_cpu_second": useful / cpu_seconds,
        "slots": float(sum(loads)),
        "useful_share": useful / sum(loads),
        "loss": sums["loss"] / sums["units"],
        "grad_norm": math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients)),
    }


def _check_same(runs: dict[str, list[Run]]) -> None:
    """All alternatives must have computed the same loss and gradient."""
    first = runs["shared_prompt"][0]
    for name, turns in runs.items():
        for key in ("loss", "grad_norm"):
            difference = max(abs(turn[key] - first[key]) / abs(first[key]) for turn in turns)
            if difference > 1e-4:
                raise SystemExit(f"{key} of {name} differs by {difference:.2g}: nothing to compare")


def _report_speed(runs: dict[str, list[Run]]) -> dict[str, Any]:
    keys = ("useful_per_second", "useful_per_cpu_second", "seconds")
    rows, found = [], {}
    for name, turns in runs.items():
        gain = ratios(turns, runs[_LONGEST], "useful_per_second")
        rows.append(
            [
                name,
                f"{turns[0]['slots']:,.0f}",
                f"{turns[0]['useful_share']:.1%}",
                *(spread(column(turns, key), 0 if key != "seconds" else 2) for key in keys),
                spread(gain),
            ]
        )
        found[name] = {
            **{key: turns[0][key] for key in ("slots", "useful_share")},
            **{key: summary(column(turns, key)) for key in keys},
            "gain": summary(gain),
        }
    headings = ["", "slots", "useful", "useful tokens/s", "per CPU second", "seconds", f"x {_LONGEST}"]
    show("Forward and backward of one global batch", headings, rows)
    return found


# ---- counted ----


def useful_tokens(units: Units, indices: np.ndarray) -> int:
    """Tokens of the prompts, once each, and of all responses."""
    prompts, responses, _ = units.token_counts()[indices].T
    return int(prompts.sum() + responses.sum())


def row_slots(layout: Layout, units: Units, indices: np.ndarray, *, dp_size: int) -> list[list[int]]:
    """Token positions of every microbatch of every data-parallel rank, as they are computed."""
    return [
        [
            layout.collate(units, chosen).num_slots
            for chosen in layout.microbatches(units, indices, dp_rank=rank, dp_size=dp_size)
        ]
        for rank in range(dp_size)
    ]


def _report_counts(options: argparse.Namespace) -> list[dict[str, Any]]:
    count = options.pairs * options.batches
    units = Units(chat_pairs(count, vocabulary=_VOCABULARY, seed=options.seed + 1, scale=options.scale))
    found = [
        _count(options, units, budget=int(budget * options.scale), ranks=ranks, multiple=multiple)
        for budget in _BUDGETS
        for ranks in _RANKS
        for multiple in _MULTIPLES
    ]
    rows = [
        [
            f"{one['micro_batch_tokens']:,}",
            *(str(one[key]) for key in ("data_parallel_ranks", "multiple")),
            f"{one['useful_share']:.2%}",
            f"{one['busy_share']:.2%}",
            f"{one['filled_share']:.1%}",
            f"{one['overlong_units']} of {count}",
        ]
        for one in found
    ]
    headings = ["micro_batch_tokens", "ranks", "rows are multiples of", "useful of computed"]
    headings += ["useful of all ranks' time", "rows filled", "units above it"]
    show(f"shared_prompt, {options.batches} batches of {options.pairs} pairs", headings, rows)
    return found


def _count(
    options: argparse.Namespace, units: Units, *, budget: int, ranks: int, multiple: int
) -> dict[str, Any]:
    """Shares over all batches: what rows, waiting ranks and half-empty rows leave of the slots."""
    layout = Layout("shared_prompt", budget, options.micro_batch_size, pad_to_multiple=multiple)
    useful = computed = waited = capacity = 0
    for start in range(0, units.num_units, options.pairs):
        indices = np.arange(start, start + options.pairs)
        loads = row_slots(layout, units, indices, dp_size=ranks)
        useful += useful_tokens(units, indices)
        computed += sum(map(sum, loads))
        waited += ranks * max(map(sum, loads))  # as if every rank were as slow as the slowest
        capacity += sum(max(budget, slots) for rows in loads for slots in rows)
    overlong = int((layout.unit_tokens(units, np.arange(units.num_units)) > budget).sum())
    return {
        "micro_batch_tokens": budget,
        "data_parallel_ranks": ranks,
        "multiple": multiple,
        "useful_share": useful / computed,
        "busy_share": useful / waited,
        "filled_share": computed / capacity,
        "overlong_units": overlong,
    }
