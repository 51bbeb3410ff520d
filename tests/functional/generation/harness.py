"""Runs the generate stage with the real engine, as the loop does."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from nemo_spin.config.schema import Config, GenerationConfig
from nemo_spin.data.columns import GENERATED
from nemo_spin.data.files import Manifest
from nemo_spin.data.pairs import iter_shards
from nemo_spin.generation.keeper import EngineKeeper
from nemo_spin.generation.running import RunningGeneration, wait
from nemo_spin.generation.stage import finish, generate

MAX_TOKENS = 24
# The random model's end token is rare; with these about half of its answers end by themselves.
STOP_TOKEN_IDS = list(range(30, 38))


def configuration(**generation: Any) -> Config:
    """Two answers to each prompt, small shards; `generation` overrides."""
    settings = {
        "num_generations": 2,
        "max_tokens": MAX_TOKENS,
        "shard_rows": 9,
        "stop_token_ids": STOP_TOKEN_IDS,
        "python": os.environ.get("NEMO_SPIN_VLLM_PYTHON"),  # else .venv-vllm of this repository
        "load_timeout_s": 300.0,
        "shard_timeout_s": 300.0,
    }
    return Config(run_dir="run", generation=GenerationConfig(**{**settings, **generation}))


@dataclass
class Stage:
    """The generate stage in a directory of its own."""

    model_dir: Path
    prepared: Path
    directory: Path
    config: Config = field(default_factory=configuration)
    inputs: dict[str, Any] = field(default_factory=lambda: {"data": "d" * 64})
    iteration: int = 1
    opponent_sha256: str = "a" * 64
    adapter_dir: Path | None = None
    canary_path: Path | None = None
    keeper: EngineKeeper | None = None

    @property
    def out_dir(self) -> Path:
        return self.directory / "generated"

    @property
    def log_path(self) -> Path:
        return self.directory / "logs" / "generate.log"

    @property
    def progress_path(self) -> Path:
        return self.directory / "logs" / "generate.progress"

    def start(self) -> RunningGeneration:
        return generate(
            self.config,
            model_dir=self.model_dir,
            prepared=self.prepared,
            out_dir=self.out_dir,
            iteration=self.iteration,
            opponent_sha256=self.opponent_sha256,
            inputs=self.inputs,
            progress_path=self.progress_path,
            log_path=self.log_path,
            adapter_dir=self.adapter_dir,
            canary_path=self.canary_path,
            keeper=self.keeper,
        )

    def finish(self, notes: dict[str, Any] | None = None) -> Manifest:
        return finish(
            self.config,
            prepared=self.prepared,
            out_dir=self.out_dir,
            iteration=self.iteration,
            opponent_sha256=self.opponent_sha256,
            inputs=self.inputs,
            notes=notes,
        )

    def run(self) -> Manifest:
        job = self.start()
        wait(job)
        return self.finish(job.notes)

    def notes(self) -> list[str]:
        """What the user was told."""
        events = [json.loads(line) for line in self.progress_path.read_text().splitlines()]
        return [event["text"] for event in events if event["event"] == "note"]

    def table(self, split: str = "train") -> pa.Table:
        return pa.concat_tables(iter_shards(self.out_dir, split, schema=GENERATED))


def by_key(table: pa.Table) -> dict[tuple[str, int], dict[str, Any]]:
    """(id, sample) -> row."""
    return {(row["id"], row["sample"]): row for row in table.to_pylist()}
