"""Answers to prompts: the generate stage with the real vLLM, against `transformers` generate.

Same weights, prompts, sampling settings and limit, in float32 on the same threads, each in processes
of its own, in turns. Before, both answer some prompts greedily, and all tokens must be the same; the
mean lengths of the drawn answers must agree within four standard errors. The peer pads on the left,
takes the longest prompts first, and the batch size and cache that were fastest on the first prompts.
Prompts have chat-like lengths. Answers end at random, after `--mean-tokens` on average, as those of a
trained model do; with 0 hardly any ends before the limit, which is best for whole batches. Starting
is what comes before the first prompt is answered (imports, processes, loading), and ours' end.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from examples.benchmarks.answering import END_ID, FIRST_WORD_ID, write_answering_llama
from examples.benchmarks.batched_generate import answers_of, fastest
from examples.benchmarks.chat_lengths import PROMPT, lengths
from examples.benchmarks.measure import Run, column, in_a_process, ratios, show, spread, summary, take_turns

SUMMARY = "tokens per second of the generate stage, against transformers' generate"
OURS, PEER = "nemo_spin", "transformers"
_STANDARD_ERRORS = 4
_NUMBERS = ("generating_s", "starting_s", "tokens_per_second", "with_start_per_second", "mean_tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes of the model and of what it is asked."""
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--scale", type=float, default=0.25, help="factor for the prompts' lengths")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
    parser.add_argument("--mean-tokens", type=float, default=64, help="of an answer without limit; 0: no end")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--peer-batch-sizes", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--searched", type=int, default=128, help="prompts for each setting of the peer")
    parser.add_argument("--checked", type=int, default=8, help="prompts that both answer greedily")
    parser.add_argument("--python", help="interpreter with vLLM; left out: as generation.python=null")
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Checks, searches the peer's settings, measures in turns, and prints a table."""
    if options.searched < max(options.peer_batch_sizes):
        raise SystemExit(f"--searched {options.searched}: as many as the largest batch, at least")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the sampler's process
    sizes = {"vocabulary": options.vocabulary, "hidden": options.hidden, "layers": options.layers}
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        write_answering_llama(place / "endless", **sizes, mean_tokens=0)
        write_answering_llama(place / "model", **sizes, mean_tokens=options.mean_tokens)
        _write_prompts(place / "prompts", options, options.prompts)
        _write_prompts(place / "checked", options, options.checked)
        in_a_process(_check_greedy, place, options)
        searched, batch_size, cache = in_a_process(_search, place, options)
        print("peer, tokens/s:", ", ".join(f"{rate:.0f} ({name})" for name, rate in searched.items()))
        runs = take_turns(
            {
                OURS: (_ours, (place, options)),
                PEER: (_peer, (place, options, batch_size, cache)),
            },
            options.repeats,
        )
    _check_lengths(runs, options.prompts)
    results = _report(runs, options, f"{batch_size} prompts at a time, {cache} cache")
    return results | {"searched_tokens_per_second": searched, "batch_size": batch_size, "cache": cache}


def _write_prompts(directory: Path, options: argparse.Namespace, count: int) -> None:
    """Prepared rows of random words."""
    from nemo_spin.data.columns import PREPARED
    from nemo_spin.data.files import write_manifest

    generator = np.random.default_rng(options.seed)
    rows = [
        {
            "id": f"prompt-{index}",
            "prompt_ids": generator.integers(FIRST_WORD_ID, options.vocabulary, size),
            "real_ids": [FIRST_WORD_ID, END_ID],
            "prompt_text": "",
            "real_text": "",
        }
        for index, size in enumerate(lengths(generator, count, PROMPT, options.scale))
    ]
    directory.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=PREPARED), directory / "train.parquet")
    counts = {"stop_token_ids": [END_ID]}
    write_manifest(directory, stage="prepare", files=["train.parquet"], inputs={}, counts=counts)


# ---- ours ----


def _ours(place: Path, options: argparse.Namespace) -> Run:
    """The generate stage, its checks and files included."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=place) as out:
        answers, notes, staged = _stage(place / "model", place / "prompts", Path(out), options)
    seconds = time.perf_counter() - began
    return _result(answers, seconds, seconds - staged + notes["engine"]["seconds"])


def _stage(
    model: Path, prepared: Path, out: Path, options: argparse.Namespace, temperature: float = 1.0
) -> tuple[list[list[int]], dict[str, Any], float]:
    """The answers, how the stage came to its engine, and its seconds; then the engine is ended."""
    from nemo_spin.config.schema import Config, GenerationConfig
    from nemo_spin.data.columns import GENERATED
    from nemo_spin.data.pairs import iter_shards
    from nemo_spin.generation.job import SamplerJob
    from nemo_spin.generation.keeper import EngineKeeper
    from nemo_spin.generation.running import wait
    from nemo_spin.generation.stage import finish, generate

    settings = GenerationConfig(python=options.python, temperature=temperature, max_tokens=options.tokens)
    common: dict[str, Any] = {
        "config": Config(generation=settings),
        "prepared": prepared,
        "out_dir": out / "generated",
        "iteration": 0,
        "opponent_sha256": "",
        "inputs": {},
    }
    out.mkdir(exist_ok=True)
    keeper = EngineKeeper()  # as in the loop, which takes the answers before the engine ends
    start = time.perf_counter()
    try:
        job = generate(
            model_dir=model,
            progress_path=out / "progress.jsonl",
            log_path=out / "generate.log",
            keeper=keeper,
            **common,
        )
        assert isinstance(job, SamplerJob), "nothing is there yet"
        wait(job, poll_s=0.01)
        finish(**common, notes=job.notes)
        seconds = time.perf_counter() - start
    finally:
        keeper.close()
    answers = pa.concat_tables(iter_shards(common["out_dir"], "train", schema=GENERATED))
    return answers["generated_ids"].to_pylist(), job.notes, seconds


# ---- the peer ----


def _peer(place: Path, options: argparse.Namespace, batch_size: int, cache: str) -> Run:
    """The same by `transformers`."""
    began = time.perf_counter()
    model = _loaded(place / "model", options.threads)
    ready = time.perf_counter()
    answers = answers_of(
        model,
        _prompts(place / "prompts"),
        batch_size=batch_size,
        cache=cache,
        max_tokens=options.tokens,
        temperature=1.0,
    )
    return _result(answers, time.perf_counter() - began, ready - began)


def _search(place: Path, options: argparse.Namespace) -> tuple[dict[str, float], int, str]:
    model = _loaded(place / "model", options.threads)
    prompts = _prompts(place / "prompts")[: options.searched]
    settings = {"max_tokens": options.tokens, "temperature": 1.0}
    answers_of(model, prompts[:2], batch_size=2, max_tokens=2, temperature=1.0)  # what the first one costs
    return fastest(model, prompts, options.peer_batch_sizes, **settings)


def _loaded(directory: Path, threads: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def _prompts(directory: Path) -> list[list[int]]:
    ids: list[list[int]] = pq.read_table(directory / "train.parquet")["prompt_ids"].to_pylist()
    return ids


# ---- both ----


def _check_greedy(place: Path, options: argparse.Namespace) -> None:
    """Both must give the same greedy answers, token for token."""
    prepared = place / "checked"
    ours, _, _ = _stage(place / "endless", prepared, place / "greedy", options, temperature=0.0)
    model, prompts = _loaded(place / "endless", options.threads), _prompts(prepared)
    theirs = answers_of(model, prompts, batch_size=len(prompts), max_tokens=options.tokens, temperature=0.0)
    if ours != theirs:
        raise SystemExit("the greedy answers differ: nothing to compare")


def _result(answers: list[list[int]], seconds: float, starting_s: float) -> Run:
    sizes = np.array([len(answer) for answer in answers])
    generating_s = seconds - starting_s
    return {
        "tokens": float(sizes.sum()),
        "mean_tokens": float(sizes.mean()),
        "std_tokens": float(sizes.std()),
        "starting_s": starting_s,
        "generating_s": generating_s,
        "seconds": seconds,
        "tokens_per_second": float(sizes.sum()) / generating_s,
        "with_start_per_second": float(sizes.sum()) / seconds,
    }


def _check_lengths(runs: dict[str, list[Run]], prompts: int) -> None:
    ours, theirs = (runs[name][0] for name in (OURS, PEER))
    error = math.hypot(ours["std_tokens"], theirs["std_tokens"]) / math.sqrt(prompts)
    if abs(ours["mean_tokens"] - theirs["mean_tokens"]) > _STANDARD_ERRORS * error:
        means = f"{ours['mean_tokens']:.1f} and {theirs['mean_tokens']:.1f}"
        raise SystemExit(f"answers have {means} tokens on average: nothing to compare")


def _report(runs: dict[str, list[Run]], options: argparse.Namespace, peer: str) -> dict[str, Any]:
    results: dict[str, Any] = {}
    rows = []
    for name, turns in runs.items():
        results[name] = {key: summary(column(turns, key)) for key in _NUMBERS}
        digits = (1, 1, 0, 0, 1)
        values = [spread(column(turns, key), places) for key, places in zip(_NUMBERS, digits, strict=True)]
        rows.append([f"{name} ({peer})" if name == PEER else name, *values])
    ends = f"{options.mean_tokens:g} tokens on average" if options.mean_tokens else "the limit"
    show(
        f"{options.prompts:,} answers of at most {options.tokens} tokens that end at {ends}, "
        f"hidden {options.hidden}, {options.layers} layers; median (extremes) of {options.repeats} turns",
        ["", "generating, s", "starting, s", "tokens/s", "with starting", "tokens of an answer"],
        rows,
    )
    for key, what in (("tokens_per_second", "generating"), ("with_start_per_second", "starting included")):
        speed = ratios(runs[OURS], runs[PEER], key)
        results[f"ratio_{key}"] = summary(speed)
        print(f"{what}: {spread(speed)} times the tokens per second")
    return results
