"""Peak memory of an epoch of training with a large vocabulary, against TRL's DPOTrainer.

The same pairs as in `training`, a pair to a microbatch on both sides, each run a process of its own.
Memory is the most that is resident once the model is loaded, until the epoch has ended: whole; above what the
imports took; and above that and the 16 bytes of every weight that float32 training with Adam
holds whoever does it (weight, gradient, two moments). Needs `pip install trl`.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from examples.benchmarks.chat_lengths import chat_pairs
from examples.benchmarks.epoch import OURS, Epoch, by_nemo_spin, by_trl, check_same
from examples.benchmarks.measure import Run, column, ratios, show, summary, take_turns
from examples.benchmarks.small_llama import write_llama
from examples.benchmarks.training import need_trl

SUMMARY = "peak memory of training with a large vocabulary, against TRL's DPOTrainer"
_PEER, _PEER_RECOMPUTING = "TRL, precomputed", "TRL, precomputed, recomputing"
_BYTES_PER_WEIGHT = 16
_MIB = 2**20
_VALUES = {
    "whole_mib": ("MiB, whole", 0),
    "above_mib": ("above imports", 0),
    "working_mib": ("above 16 B/weight", 0),
    "cpu_seconds": ("CPU s", 1),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--global-batch-size", type=int, default=2)
    parser.add_argument("--scale", type=float, default=1.0, help="factor for all lengths")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and tokens")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures each way in turn and prints them."""
    need_trl()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        sizes = {"vocabulary": options.vocabulary, "hidden": options.hidden, "layers": options.layers}
        model = write_llama(place / "model", **sizes)
        pairs = chat_pairs(
            options.pairs, vocabulary=options.vocabulary, seed=options.seed, scale=options.scale
        )
        pq.write_table(pairs, place / "pairs.parquet")
        epoch = Epoch(model, place / "pairs.parquet", options.global_batch_size, options.threads)
        ways = {
            OURS: (by_nemo_spin, (epoch, 1)),
            f"{OURS}, recomputing": (by_nemo_spin, (epoch, 1, True)),
            _PEER: (by_trl, (epoch, 1, True)),
            _PEER_RECOMPUTING: (by_trl, (epoch, 1, True, True)),
            "TRL, second model": (by_trl, (epoch, 1, False)),
        }
        runs = take_turns(ways, options.repeats)
        weights = number_of_weights(model)
    check_same(runs)
    for turns in runs.values():
        for turn in turns:
            turn["working_mib"] = turn["above_mib"] - weights * _BYTES_PER_WEIGHT / _MIB
    return {"weights": weights, **_report(runs, options, weights)}


def number_of_weights(model: Path) -> int:
    """Of a Hugging Face directory with one file of weights."""
    with (model / "model.safetensors").open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _report(runs: dict[str, list[Run]], options: argparse.Namespace, weights: int) -> dict[str, Any]:
    rows, found = [], {}
    for name, turns in runs.items():
        like = runs[_PEER_RECOMPUTING if name.endswith("recomputing") else _PEER]
        share = {key: ratios(turns, like, key) for key in ("whole_mib", "above_mib", "working_mib")}
        found[name] = {key: summary(column(turns, key)) for key in _VALUES}
        found[name]["over_precomputed_trl"] = {key: summary(values) for key, values in share.items()}
        medians = (f"{found[name][key]['median']:,.{digits}f}" for key, (_, digits) in _VALUES.items())
        rows.append([name, *medians, *(f"{np.median(values):.2f}" for values in share.values())])
    headings = [
        "",
        *(heading for heading, _ in _VALUES.values()),
        "x whole",
        "x above imports",
        "x above 16 B",
    ]
    print("x: over TRL with precomputed values, recomputing where the row does")
    title = f"{weights / 1e6:,.0f}M weights, vocabulary {options.vocabulary:,}, {options.pairs} pairs"
    show(f"{title}; medians of {options.repeats} turns", headings, rows)
    return found
