"""New weights into the engine that is running, against a new engine on the same weights.

Both are the generate stage as the loop runs it, with the real vLLM: a random Llama answers
prompts greedily, first with other weights. Measured is the time from the start of the stage
until the engine can answer; all answers of both have to be the same, token for token.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from examples.benchmarks.measure import Run, column, ratios, show, spread, summary
from nemo_spin.config.schema import Config, GenerationConfig
from nemo_spin.data.columns import GENERATED, PREPARED
from nemo_spin.data.files import write_manifest
from nemo_spin.data.pairs import iter_shards
from nemo_spin.generation.job import SamplerJob
from nemo_spin.generation.keeper import EngineKeeper
from nemo_spin.generation.running import wait
from nemo_spin.generation.stage import finish, generate

SUMMARY = "seconds until an engine answers with new weights: refreshed and restarted"
_VOCABULARY = 8192
_STOP = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes of the model and of what it is asked."""
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32, help="of an answer, at most")
    parser.add_argument("--python", help="interpreter with vLLM; left out: as generation.python=null")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures, compares and prints a table.

    Raises:
        RuntimeError: The answers differ, or an engine was not opened as it should be.
    """
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        prepared = _write_prompts(root / "data", options.prompts)
        models = [_write_model(root / f"theta_{seed}", options, seed=seed) for seed in (0, 1)]
        parameters = sum(path.stat().st_size for path in models[0].glob("*.safetensors")) // 4
        runs: dict[str, list[Run]] = {"restart": [], "refresh": []}
        with _keeper() as keeper:
            _answer(options, models[0], prepared, root / "first", keeper)
            for repeat in range(options.repeats):
                model = models[(repeat + 1) % 2]
                restarted = _answer(options, model, prepared, root / f"restart-{repeat}", None)
                refreshed = _answer(options, model, prepared, root / f"refresh-{repeat}", keeper)
                _check(restarted, refreshed)
                runs["restart"].append({"seconds": restarted[0]["seconds"]})
                runs["refresh"].append({"seconds": refreshed[0]["seconds"]})
    faster = ratios(runs["restart"], runs["refresh"], "seconds")
    rows = [[way, spread(column(of_way, "seconds"), 3)] for way, of_way in runs.items()]
    show(f"Llama, {parameters / 1e6:.0f}M parameters, float32", ["", "seconds"], rows)
    print(f"refreshing is {spread(faster, 1)} times faster; {options.prompts} greedy answers each: the same")
    return {
        "parameters": parameters,
        "seconds": {way: summary(column(of_way, "seconds")) for way, of_way in runs.items()},
        "restart_over_refresh": summary(faster),
    }


@contextmanager
def _keeper() -> Iterator[EngineKeeper]:
    keeper = EngineKeeper()
    try:
        yield keeper
    finally:
        keeper.close()


def _answer(
    options: argparse.Namespace, model: Path, prepared: Path, directory: Path, keeper: EngineKeeper | None
) -> tuple[dict[str, Any], pa.Table]:
    """How the stage came to its engine, and the answers."""
    generation = GenerationConfig(
        python=options.python, temperature=0.0, max_tokens=options.tokens, keep_engine="always"
    )
    common: dict[str, Any] = {
        "config": Config(generation=generation),
        "prepared": prepared,
        "out_dir": directory / "generated",
        "iteration": 0,
        "opponent_sha256": model.name,
        "inputs": {"opponent": model.name},
    }
    job = generate(
        model_dir=model,
        progress_path=directory / "progress.jsonl",
        log_path=directory / "generate.log",
        keeper=keeper,
        **common,
    )
    assert isinstance(job, SamplerJob), "nothing is there that would be kept"
    wait(job, poll_s=0.01)
    finish(**common, notes=job.notes)
    return job.notes["engine"], pa.concat_tables(iter_shards(common["out_dir"], "train", schema=GENERATED))


def _check(restarted: tuple[dict[str, Any], pa.Table], refreshed: tuple[dict[str, Any], pa.Table]) -> None:
    ways = (restarted[0]["way"], refreshed[0]["way"])
    if ways != ("started", "refreshed"):
        raise RuntimeError(f"the engines were {ways[0]} and {ways[1]}")
    if not restarted[1].equals(refreshed[1]):
        raise RuntimeError("a refreshed engine and a new one answered differently")


def _write_model(directory: Path, options: argparse.Namespace, *, seed: int) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=_STOP,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(directory)
    return directory


def _write_prompts(directory: Path, count: int) -> Path:
    chance = random.Random(0)
    rows = [
        {
            "id": f"prompt-{index}",
            "prompt_ids": [chance.randrange(3, _VOCABULARY) for _ in range(chance.randint(8, 64))],
            "real_ids": [3, _STOP],
            "prompt_text": "",
            "real_text": "",
        }
        for index in range(count)
    ]
    directory.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=PREPARED), directory / "train.parquet")
    counts = {"stop_token_ids": [_STOP]}
    write_manifest(directory, stage="prepare", files=["train.parquet"], inputs={}, counts=counts)
    return directory
