"""One epoch of self-play training, reference scoring included, against TRL's DPOTrainer.

Both do what `epoch` says, each in a process of its own, in turns. The peer's pairs are sorted by length
inside of each batch, so that it pads least; its microbatch size is the fastest of those that are
tried on a few pairs, where losses must agree to 1e-3 before anything is timed, and then in all
steps (a single size is not tried). It runs with the reference's log-probabilities computed before
(`precompute_ref_log_probs`) and with a second model in every step; what counts is the faster of both.
Needs `pip install trl`.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from examples.benchmarks.chat_lengths import PROMPT, RESPONSE, lengths, random_pairs
from examples.benchmarks.epoch import OURS, Epoch, by_nemo_spin, by_trl, check_same, losses_of
from examples.benchmarks.measure import Run, column, ratios, show, spread, summary, take_turns
from examples.benchmarks.small_llama import write_llama

SUMMARY = "an epoch of training with reference scoring, against TRL's DPOTrainer"
_SHAPES = {"equal": (250, 250, 250), "long_prompt": (800, 200, 200)}  # prompt, real, generated
_PRECOMPUTED, _SECOND_MODEL = "TRL, precomputed", "TRL, second model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes of model and data."""
    mixes = ("chat", *_SHAPES)
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--global-batch-size", type=int, default=16)
    parser.add_argument("--lengths", choices=mixes, nargs="+", default=list(mixes))
    parser.add_argument("--scale", type=float, default=1.0, help="factor for all lengths")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--micro-batch-tokens", type=int, default=2048, help="of our packed rows")
    parser.add_argument("--peer-micro-batch-sizes", type=int, nargs="+", default=[1, 2, 4], help="pairs")
    parser.add_argument("--tried-pairs", type=int, default=16, help="that the peer's settings are tried on")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and tokens")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures all ways in turn, for each kind of lengths, and prints them."""
    need_trl()
    if options.tried_pairs < 2 * max(options.peer_micro_batch_sizes):
        raise SystemExit(
            f"--tried-pairs {options.tried_pairs}: two steps of the largest microbatch, at least"
        )
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        sizes = {"vocabulary": options.vocabulary, "hidden": options.hidden, "layers": options.layers}
        model = write_llama(place / "model", **sizes)
        for kind in options.lengths:
            results[kind] = _one_kind(kind, model, place, options)
    return results


def need_trl() -> None:
    """Ends the program where the peer is not installed."""
    try:
        import trl  # noqa: F401
    except ImportError:
        raise SystemExit("the peer is not installed: pip install trl") from None


def _one_kind(kind: str, model: Path, place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The table of one kind of lengths."""
    pairs = sorted_within_batches(_pairs(kind, options), options.global_batch_size)
    whole = _epoch(model, pairs, place / f"{kind}.parquet", options)
    tried = _tried(kind, model, pairs, place, options)
    size = min(tried, key=lambda one: tried[one])
    ways = {
        OURS: (by_nemo_spin, (whole, options.micro_batch_tokens)),
        _PRECOMPUTED: (by_trl, (whole, size, True)),
        _SECOND_MODEL: (by_trl, (whole, size, False)),
    }
    runs = take_turns(ways, options.repeats)
    check_same(runs)
    title = f"{kind} lengths, {options.pairs} pairs, hidden {options.hidden}, {options.layers} layers"
    results = _report(runs, f"{title}, TRL's microbatches of {size}; {options.repeats} turns")
    return results | {"tried_micro_batch_sizes": {str(size): value for size, value in tried.items()}}


def _tried(
    kind: str, model: Path, pairs: pa.Table, place: Path, options: argparse.Namespace
) -> dict[int, float]:
    """Seconds of the peer on a few pairs by microbatch size, once losses agree; of a single one nothing."""
    sizes = options.peer_micro_batch_sizes
    if len(sizes) == 1:
        return {sizes[0]: 0.0}
    few = _epoch(model, pairs.slice(0, options.tried_pairs), place / f"{kind}-few.parquet", options)
    few = replace(few, global_batch_size=max(1, options.tried_pairs // 2))  # two steps
    ways: dict[str, tuple[Any, tuple[Any, ...]]] = {OURS: (by_nemo_spin, (few, options.micro_batch_tokens))}
    ways |= {str(size): (by_trl, (few, size, True)) for size in sizes}
    found = take_turns(ways, 1)
    check_same(found)
    return {size: found[str(size)][0]["seconds"] for size in sizes}


def _epoch(model: Path, pairs: pa.Table, path: Path, options: argparse.Namespace) -> Epoch:
    pq.write_table(pairs, path)
    return Epoch(model, path, options.global_batch_size, options.threads)


def _pairs(kind: str, options: argparse.Namespace) -> pa.Table:
    generator = np.random.default_rng(options.seed)
    if kind == "chat":
        shapes = (PROMPT, RESPONSE, RESPONSE)
        sizes = np.stack(
            [lengths(generator, options.pairs, shape, options.scale) for shape in shapes], axis=1
        )
    else:
        one = np.maximum(np.array(_SHAPES[kind]) * options.scale, 1).astype(np.int64)
        sizes = np.tile(one, (options.pairs, 1))
    return random_pairs(sizes, vocabulary=options.vocabulary, generator=generator)


def sorted_within_batches(pairs: pa.Table, batch: int) -> pa.Table:
    """The same batches, each with its pairs by the length that a row of the peer is padded to."""
    prompt, *responses = (
        np.array([len(ids) for ids in pairs[name].to_pylist()])
        for name in ("prompt_ids", "real_ids", "generated_ids")
    )
    padded = prompt + np.maximum(*responses)
    order = np.lexsort((padded, np.arange(pairs.num_rows) // batch))
    return pairs.take(order)


def _report(runs: dict[str, list[Run]], title: str) -> dict[str, Any]:
    peers = [name for name in runs if name != OURS]
    best = min(peers, key=lambda name: float(np.median(column(runs[name], "seconds"))))
    values = (("seconds", 2), ("cpu_seconds", 2), ("pairs_per_second", 2), ("above_mib", 0))
    results: dict[str, Any] = {}
    rows = []
    for name, turns in runs.items():
        speed = {key: ratios(runs[best], turns, key) for key in ("seconds", "cpu_seconds")}
        results[name] = {key: summary(column(turns, key)) for key, _ in values}
        results[name]["speed_over_best_peer"] = {key: summary(each) for key, each in speed.items()}
        shown = (spread(column(turns, key), digits) for key, digits in values)
        rows.append([name, *shown, *map(spread, speed.values())])
    last = list(losses_of(runs[OURS][0]))[-1]
    results["last_loss"] = {name: turns[0][last] for name, turns in runs.items()}
    headings = ["", "seconds", "CPU seconds", "pairs/s", "peak MiB", "x TRL", "x in CPU s"]
    show(f"{title}; x: over the faster TRL, MiB: above imports", headings, rows)
    return results
