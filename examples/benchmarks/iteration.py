"""One iteration of self-play from chats to the next model: `nemo-spin run` against the official steps.

The peer is `official_steps.py`: answers by `transformers` generate or by vLLM in a fresh process, text
to parquet, DPOTrainer with a second model, save. All start with the same chats and weights, run
the same epochs with the same batch size, RMSprop, schedule and beta, in float32 on the same
threads, and end with a Hugging Face directory; every process counts from its start to its end, also
with its CPU seconds, which say more where a machine has other work. Ours
checks, hashes and reads back besides, and leaves a checkpoint to resume from and a report. Before
times are shown: all prompts and demonstrations have the same tokens, the first loss is ln 2 in all, and
the mean lengths of the answers agree within four standard errors. Needs `pip install trl`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from examples.benchmarks.answering import write_answering_llama, write_word_chats, write_word_tokenizer
from examples.benchmarks.measure import Run, column, ratios, show, spread, summary, take_turns

SUMMARY = "one whole iteration, against the official pipeline's steps"
_ROOT = Path(__file__).parents[2]
_OURS = "nemo_spin"
_PEERS = {"official steps, transformers": "generate_hf", "official steps, vLLM": "generate_vllm"}
_BETA, _LR, _WARMUP = 0.1, 5e-7, 0.1  # the official configuration's
_TEMPLATE_TOKENS = 3  # of a prompt, besides its words
_STANDARD_ERRORS = 4
_TOLERANCE = 1e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes of model and data, and settings of the peer."""
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--scale", type=float, default=0.25, help="factor for the lengths of chats")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
    parser.add_argument("--mean-tokens", type=float, default=75, help="of an answer without limit")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--global-batch-size", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--micro-batch-tokens", type=int, default=2048, help="of our packed rows")
    parser.add_argument("--peer-micro-batch-size", type=int, default=1, help="pairs; as `training` finds")
    parser.add_argument("--peer-batch-size", type=int, default=64, help="of transformers' generate")
    parser.add_argument("--peer-cache", default="static", help="of transformers' generate")
    parser.add_argument("--python", help="interpreter with vLLM; left out: as generation.python=null")
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures all ways in turn, checks that they did the same, and prints them."""
    try:
        import trl  # noqa: F401
    except ImportError:
        raise SystemExit("the peer is not installed: pip install trl") from None
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        write_answering_llama(
            place / "model",
            vocabulary=options.vocabulary,
            hidden=options.hidden,
            layers=options.layers,
            mean_tokens=options.mean_tokens,
        )
        write_word_tokenizer(place / "model", vocabulary=options.vocabulary)
        write_word_chats(
            place / "chats.jsonl",
            options.prompts,
            vocabulary=options.vocabulary,
            seed=options.seed,
            scale=options.scale,
        )
        ways: dict[str, Any] = {_OURS: (_ours, (place, options))}
        ways |= {name: (_peer, (place, options, step)) for name, step in _PEERS.items()}
        runs = take_turns(ways, options.repeats)
    _check_same(runs, options.prompts)
    return _report(runs, options)


# ---- ours ----


def _ours(place: Path, options: argparse.Namespace) -> Run:
    """`nemo-spin run`, one iteration."""
    with tempfile.TemporaryDirectory(dir=place) as out:
        settings = {
            "run_dir": f"{out}/run",
            "seed": options.seed,
            "model.path": place / "model",
            "model.global_batch_size": options.global_batch_size,
            "model.micro_batch_tokens": options.micro_batch_tokens,
            "spin.iterations": 1,
            "spin.beta": _BETA,
            "spin.lr": _LR,
            "spin.epochs": options.epochs,
            "model.optim.sched.warmup_ratio": _WARMUP,
            "data.train": place / "chats.jsonl",
            "generation.max_tokens": options.tokens,
            "generation.python": options.python or "null",
            "evaluation.enabled": "false",
            "launcher.omp_num_threads": options.threads,
        }
        command = ["nemo_spin.cli", "run", *(f"{key}={value}" for key, value in settings.items())]
        seconds = _timed(sys.executable, command, Path(out), options.threads)
        return _result_of_ours(Path(out, "run"), seconds)


def _result_of_ours(run_dir: Path, seconds: tuple[float, float]) -> Run:
    from nemo_spin.data.columns import SCORED
    from nemo_spin.data.pairs import iter_shards

    stages = json.loads((run_dir / "state.json").read_text(encoding="utf-8"))["stages"]
    of = {name.removeprefix("iter_00/"): stage["seconds"] for name, stage in stages.items()}
    rows = pa.concat_tables(iter_shards(run_dir / "iter_00" / "scored", "train", schema=SCORED))
    metrics = (run_dir / "iter_00" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [line for line in map(json.loads, metrics) if line["split"] == "train"]
    times = {"generate_s": of["generate"], "train_s": of["score"] + of["train"]}
    sizes = pc.list_value_length(rows["generated_ids"]).to_numpy()
    given = [pc.sum(pc.list_value_length(rows[name])).as_py() for name in ("prompt_ids", "real_ids")]
    measured = _result(seconds, times, sizes, given, first_loss=steps[0]["loss"])
    return measured | {f"stage_{name}": took for name, took in of.items()}


# ---- the peer ----


def _peer(place: Path, options: argparse.Namespace, generate: str) -> Run:
    """The official steps, one process after the other."""
    from nemo_spin.generation.environment import find_python

    with tempfile.TemporaryDirectory(dir=place) as name:
        out = Path(name)
        (out / "settings.json").write_text(json.dumps(_settings(place, options)), encoding="utf-8")
        seconds = {}
        for step in (generate, "convert", "train"):
            python = find_python(options.python) if step == "generate_vllm" else sys.executable
            command = ["examples.benchmarks.official_steps", step, name]
            seconds[step] = _timed(python, command, out, options.threads)
        found = {step: json.loads((out / f"{step}.json").read_text(encoding="utf-8")) for step in seconds}
        if not (out / "model" / "model.safetensors").exists():
            raise SystemExit("the peer saved no model")
    sizes, trained = np.array(found[generate]["tokens"]), found["train"]
    closed = found[generate]["words"] + len(sizes)  # every answer gets an end again
    given = [trained["prompt_ids"], trained["chosen_ids"]]
    times = {"generate_s": seconds[generate][0], "train_s": seconds["train"][0]}
    total, busy = (sum(step[index] for step in seconds.values()) for index in (0, 1))
    measured = _result((total, busy), times, sizes, given, first_loss=trained["losses"][0])
    return measured | {"tokens_lost_as_text": closed - trained["rejected_ids"]}


def _settings(place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Of all steps; the engine has the room for keys and values that ours gives it."""
    from nemo_spin.bridge.families import architecture_of
    from nemo_spin.config.schema import GenerationConfig
    from nemo_spin.generation.capacity import kv_cache_bytes, memory_bytes

    chats = (place / "chats.jsonl").read_text(encoding="utf-8").splitlines()
    words = max(len(json.loads(line)["messages"][0]["content"].split()) for line in chats)
    shape, engine = architecture_of(place / "model"), GenerationConfig()
    room = {"max_model_len": words + _TEMPLATE_TOKENS + options.tokens, "max_num_seqs": engine.max_num_seqs}
    return room | {
        "model": str(place / "model"),
        "chats": str(place / "chats.jsonl"),
        "threads": options.threads,
        "max_tokens": options.tokens,
        "batch_size": options.peer_batch_size,
        "cache": options.peer_cache,
        "kv_cache_bytes": kv_cache_bytes(
            dtype="float32",
            kv_numbers_per_token=2 * shape.num_layers * shape.num_query_groups * shape.head_dim,
            memory_bytes=memory_bytes(),
            **room,
        ),
        "micro_batch_size": options.peer_micro_batch_size,
        "global_batch_size": options.global_batch_size,
        "epochs": options.epochs,
        "beta": _BETA,
        "lr": _LR,
        "warmup_ratio": _WARMUP,
    }


# ---- both ----


def _timed(python: str, module: Sequence[str], out: Path, threads: int) -> tuple[float, float]:
    """Seconds of `python -m MODULE ARGUMENTS`, and of CPUs in all its processes.

    Raises:
        SystemExit: It failed; its last words are in it.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    if python != sys.executable:
        environment.pop("PYTHONPATH", None)  # of another environment
    log = out / f"{module[0]}-{module[1]}.log"
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with log.open("wb") as stream:
        done = subprocess.run(
            [python, "-m", *module], cwd=_ROOT, env=environment, stdout=stream, stderr=stream, check=False
        )
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{module[0]} {module[1]} failed:\n{log.read_text(errors='replace')[-3000:]}")
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _result(
    seconds: tuple[float, float],
    times: dict[str, float],
    sizes: np.ndarray,
    given: Sequence[int],
    *,
    first_loss: float,
) -> Run:
    return {
        "seconds": seconds[0],
        **times,
        "other_s": seconds[0] - sum(times.values()),
        "cpu_s": seconds[1],
        "mean_tokens": float(sizes.mean()),
        "std_tokens": float(sizes.std()),
        "prompt_tokens": given[0],
        "real_tokens": given[1],
        "first_loss": first_loss,
    }


def _check_same(runs: dict[str, list[Run]], prompts: int) -> None:
    """Every way must have had the same tokens, the same first loss, and answers as long."""
    ours = runs[_OURS][0]
    for name, turns in runs.items():
        for turn in turns:
            for key in ("prompt_tokens", "real_tokens"):
                if turn[key] != ours[key]:
                    raise SystemExit(f"{name} has {turn[key]} {key}, not {ours[key]}: nothing to compare")
            if turn.get("tokens_lost_as_text"):
                raise SystemExit(f"{name} trained on other answers than it drew: nothing to compare")
            if abs(turn["first_loss"] - math.log(2)) > _TOLERANCE:
                raise SystemExit(f"{name} began with a loss of {turn['first_loss']}, not ln 2")
            error = math.hypot(turn["std_tokens"], ours["std_tokens"]) / math.sqrt(prompts)
            if abs(turn["mean_tokens"] - ours["mean_tokens"]) > _STANDARD_ERRORS * error:
                means = f"{turn['mean_tokens']:.1f} tokens, not {ours['mean_tokens']:.1f}"
                raise SystemExit(f"answers of {name} have {means} on average: nothing to compare")


def _report(runs: dict[str, list[Run]], options: argparse.Namespace) -> dict[str, Any]:
    keys = ("seconds", "generate_s", "train_s", "other_s", "cpu_s", "mean_tokens")
    results: dict[str, Any] = {}
    rows = []
    for name, turns in runs.items():
        slower = ratios(turns, runs[_OURS], "seconds")
        results[name] = {key: summary(column(turns, key)) for key in (*keys, "first_loss")}
        results[name]["seconds_over_ours"] = summary(slower)
        busier = ratios(turns, runs[_OURS], "cpu_s")
        results[name]["cpu_over_ours"] = summary(busier)
        values = (spread(column(turns, key), 1) for key in keys)
        rows.append([name, *values, spread(slower), spread(busier)])
    title = (
        f"{options.prompts} prompts, {options.epochs} epochs, hidden {options.hidden}, "
        f"{options.layers} layers; median (extremes) of {options.repeats} turns"
    )
    stages = [name for name in runs[_OURS][0] if name.startswith("stage_")]
    results["stages"] = {name.removeprefix("stage_"): summary(column(runs[_OURS], name)) for name in stages}
    headings = [
        "",
        "seconds",
        "generate",
        "(score and) train",
        "other",
        "CPU s",
        "tokens",
        "x ours",
        "x its CPU",
    ]
    show(title, headings, rows)
    medians = (f"{name} {stage['median']:.1f}" for name, stage in results["stages"].items())
    print(f"seconds of our stages: {', '.join(medians)}")
    return results
