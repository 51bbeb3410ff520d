"""Demonstrations to token ids: `nemo-spin prepare`'s code against `datasets.map`.

The peer does what the official code does: chats are rendered by `apply_chat_template` in a `map` with
several processes. There the tokens are made row by row in every epoch anew; here once, in the same
`map`, in three ways. As TRL's DPOTrainer does it: row by row, a prompt and its whole conversation, so that
tokens that span the border are found. Prompt and response apart, which is less work and finds none:
row by row, or in batches. All end with a parquet file, and all token ids must be the same, or nothing
is compared. Memory is what the process and its children had resident together, looked at ten times a
second (shared pages count once for each).
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from examples.benchmarks.demonstrations import write_chats, write_tokenizer
from examples.benchmarks.measure import Run, column, ratios, show, spread, summary, take_turns

SUMMARY = "rows per second of prepare, against datasets.map"
_OURS = "nemo_spin"
_TRAINERS = "datasets.map, as DPOTrainer"
_ROWS = "datasets.map, row by row"
_BATCHES = "datasets.map, batches of 1000"
_LIMIT = 4096  # tokens: nothing is cut
_LOOK_S = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Size of the data."""
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--scale", type=float, default=1.0, help="factor for all lengths")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures all ways in turn, compares what they wrote, and prints them."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        chats = write_chats(place / "chats.jsonl", options.rows, seed=options.seed, scale=options.scale)
        write_tokenizer(place / "tokenizer", chats, vocabulary=options.vocabulary)
        ways: dict[str, Any] = {
            name: (_measured, (place, name, options.threads)) for name in (_OURS, _TRAINERS, _ROWS, _BATCHES)
        }
        runs = take_turns(ways, options.repeats)
        _check_same(place)
    return _report(runs, options)


def _measured(place: Path, way: str, processes: int) -> Run:
    """Seconds and the most memory of this process and its children."""
    memory = _TreeMemory()
    start = time.perf_counter()
    if way == _OURS:
        _ours(place, processes)
    else:
        _peer(place, processes, way)
    return {"seconds": time.perf_counter() - start, "peak_gib": memory.stop() / 2**30}


def _ours(place: Path, processes: int) -> None:
    from nemo_spin.config.schema import DataConfig
    from nemo_spin.data.prepare import prepare

    config = DataConfig(
        train=str(place / "chats.jsonl"),
        num_workers=processes,
        max_prompt_length=_LIMIT,
        max_response_length=_LIMIT,
    )
    prepare(config, tokenizer_dir=place / "tokenizer", out_dir=place / "ours")


def _peer(place: Path, processes: int, way: str) -> None:
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoTokenizer

    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(place / "tokenizer")

    def as_trainer(row: dict[str, Any]) -> dict[str, Any]:
        prompt, whole = (
            tokenizer.apply_chat_template(messages, add_generation_prompt=asks, return_dict=True)["input_ids"]
            for messages, asks in ((row["messages"][:1], True), (row["messages"], False))
        )
        return {"prompt_ids": prompt, "real_ids": whole[len(prompt) :]}

    def one(row: dict[str, Any]) -> dict[str, Any]:
        prompt, real = _rendered(tokenizer, row["messages"])
        return {"prompt_ids": _ids(tokenizer, prompt), "real_ids": _ids(tokenizer, real)}

    def many(rows: dict[str, Any]) -> dict[str, Any]:
        prompts, real = zip(*(_rendered(tokenizer, messages) for messages in rows["messages"]), strict=True)
        return {"prompt_ids": _ids(tokenizer, list(prompts)), "real_ids": _ids(tokenizer, list(real))}

    functions = {_TRAINERS: as_trainer, _ROWS: one, _BATCHES: many}
    batches = {"batched": True, "batch_size": 1000} if way == _BATCHES else {}
    with tempfile.TemporaryDirectory(dir=place) as cache:  # what another way or turn has built is not found
        data = Dataset.from_json(str(place / "chats.jsonl"), cache_dir=cache)
        data = data.map(functions[way], num_proc=processes, remove_columns=["messages"], **batches)
        data.to_parquet(str(place / f"{way}.parquet"))


def _rendered(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[str, str]:
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    return prompt, whole[len(prompt) :]


def _ids(tokenizer: Any, text: Any) -> Any:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class _TreeMemory:
    """The most memory that this process and its children had resident at once."""

    def __init__(self) -> None:
        self._most = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Bytes."""
        self._ended.set()
        self._thread.join()
        return self._most

    def _watch(self) -> None:
        import psutil

        me = psutil.Process()
        while not self._ended.wait(_LOOK_S):
            total = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.Error:  # it has ended
                    continue
            self._most = max(self._most, total)


def _check_same(place: Path) -> None:
    names = ["prompt_ids", "real_ids"]
    ours = pq.read_table(place / "ours" / "train.parquet", columns=names).to_pylist()
    for path in sorted(place.glob("*.parquet")):
        if pq.read_table(path, columns=names).to_pylist() != ours:
            raise SystemExit(f"{path.stem} has other token ids: nothing to compare")


def _report(runs: dict[str, list[Run]], options: argparse.Namespace) -> dict[str, Any]:
    peers = [name for name in runs if name != _OURS]
    best = min(peers, key=lambda name: min(column(runs[name], "seconds")))
    results: dict[str, Any] = {}
    rows = []
    for name, turns in runs.items():
        rate = [options.rows / seconds for seconds in column(turns, "seconds")]
        speed, over_trainer = (ratios(runs[peer], turns, "seconds") for peer in (best, _TRAINERS))
        results[name] = {
            "seconds": summary(column(turns, "seconds")),
            "rows_per_second": summary(rate),
            "peak_gib": summary(column(turns, "peak_gib")),
            "speed_over_best_peer": summary(speed),
            "speed_over_trainers": summary(over_trainer),
        }
        values = (spread(column(turns, "seconds")), spread(rate, 0), spread(column(turns, "peak_gib")))
        rows.append([name, *values, spread(over_trainer), spread(speed)])
    show(
        f"{options.rows:,} rows, {options.threads} processes; median (extremes) of {options.repeats} turns",
        ["", "seconds", "rows/s", "GiB", "x DPOTrainer's", "x the fastest"],
        rows,
    )
    return results
