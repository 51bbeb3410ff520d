"""What an iteration's scoring and training spend outside of computing: data, logging, checkpoints, Lightning.

Runs the processes that `nemo-spin run` starts for both stages, on answers that were made up (a sampler
takes no part), and adds up what they write down of themselves: `scored/metrics.jsonl` and the
iteration's `metrics.jsonl`. Seconds before the first step (imports, weights) are shown and not counted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from examples.benchmarks.chat_lengths import chat_pairs
from examples.benchmarks.measure import Run, column, show, spread, summary
from examples.benchmarks.small_llama import write_llama

SUMMARY = "share of scoring and training that is not computing"
_COMPUTING = ("score_forward", "train_forward_backward", "train_optimizer")
_BESIDE = (
    "score_data",
    "score_writing",
    "score_rest",
    "train_data",
    "train_checkpoint",
    "train_evaluation",
    "train_logging",
    "train_rest",
)
_BEFORE = ("score_setup", "train_setup")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--heldout", type=int, default=8, help="pairs that are evaluated at the end")
    parser.add_argument("--global-batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--scale", type=float, default=1.0, help="factor for all lengths")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs both stages `--repeats` times and prints where their time went."""
    runs = [_one_iteration(options) for _ in range(options.repeats)]
    for found in runs:
        found["beside"] = sum(found[name] for name in _BESIDE)
        found["all"] = found["beside"] + sum(found[name] for name in _COMPUTING)
    names = [*_COMPUTING, *_BESIDE, "beside", *_BEFORE]
    shares = {name: [one[name] / one["all"] for one in runs] for name in names}
    rows = [
        [
            name.replace("_", " ", 1).replace("_", "/"),
            spread(column(runs, name), 3),
            "" if name in _BEFORE else spread([100 * share for share in shares[name]]),
        ]
        for name in names
    ]
    steps = -(-options.pairs // options.global_batch_size)
    title = f"{options.pairs} pairs in {steps} steps, hidden {options.hidden}, {options.layers} layers"
    show(f"{title}; {options.repeats} turns", ["", "seconds", "% of the stages"], rows)
    seconds = {name: summary(column(runs, name)) for name in (*names, "all")}
    return {"seconds": seconds, "shares": {name: summary(values) for name, values in shares.items()}}


def _one_iteration(options: argparse.Namespace) -> Run:
    """Seconds of scoring and training by phase."""
    from nemo_spin.config.load import from_mapping, to_yaml
    from nemo_spin.data.files import read_manifest
    from nemo_spin.selfplay.run_directory import RunDirectory

    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        sizes = {"vocabulary": options.vocabulary, "hidden": options.hidden, "layers": options.layers}
        model, run = write_llama(place / "model", **sizes), RunDirectory(place / "run")
        here = run.iteration(0)
        here.generated.mkdir(parents=True)
        here.opponent.symlink_to(model)
        for split, count in (("train", options.pairs), ("heldout", options.heldout)):
            pq.write_table(
                _generated(count, options), here.generated / f"{split}-shard-00000-of-00001.parquet"
            )
        run.config_path.write_text(to_yaml(from_mapping(_settings(model, options))), encoding="utf-8")
        for stage in ("score", "train"):
            _run_stage(stage, run.path, place, options.threads)
        scored, trained = read_manifest(here.scored), read_manifest(here.train)
    assert scored is not None, "a stage that ended well leaves a manifest"
    assert trained is not None, "a stage that ended well leaves a manifest"
    return {**_phases("score", scored.counts), **_phases("train", trained.counts)}


def _settings(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": {
            "path": str(model),
            "global_batch_size": options.global_batch_size,
            "micro_batch_tokens": options.micro_batch_tokens,
        },
        "spin": {"gates": {"sampler": False}},  # nobody sampled
        "trainer": {"precision": "32"},
    }


def _generated(count: int, options: argparse.Namespace) -> pa.Table:
    """Rows as a sampler leaves them."""
    from nemo_spin.data.columns import GENERATED

    table = chat_pairs(count, vocabulary=options.vocabulary, scale=options.scale)
    rest = {
        "id": [f"{row:08d}" for row in range(count)],
        "sample": [0] * count,
        "iteration": [0] * count,
        "finish_reason": ["stop"] * count,
        "sampler_logps": [0.0] * count,
        "num_sampler_tokens": [1] * count,
        "opponent_sha256": [""] * count,
    }
    for name, values in rest.items():
        table = table.append_column(name, pa.array(values, GENERATED.field(name).type))
    return table.select(GENERATED.names).cast(GENERATED)


def _run_stage(stage: str, run_dir: Path, place: Path, threads: int) -> None:
    """One rank of a stage, as the command starts it."""
    (place / "inputs.json").write_text("{}", encoding="utf-8")
    arguments = ["--run-dir", str(run_dir), "--iteration", "0", "--inputs", str(place / "inputs.json")]
    one_rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-m", "nemo_spin.selfplay.worker", stage, *arguments],
        env=os.environ | one_rank,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{stage} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def _phases(stage: str, counts: dict[str, Any]) -> Run:
    """Seconds of each phase, of which there may be more, and of what lies between them."""
    phases = {
        "score": ("data", "forward", "writing"),
        "train": ("data", "forward_backward", "optimizer", "checkpoint", "evaluation", "logging"),
    }[stage]
    seconds = {name: float(counts[f"{name}_seconds"]) for name in ("setup", *phases)}
    rest = float(counts[f"{stage}_seconds"]) - sum(seconds.values())
    return {f"{stage}_{name}": value for name, value in (seconds | {"rest": rest}).items()}
