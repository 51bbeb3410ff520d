"""`spin.num_prompts`: which prompts an iteration answers."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nemo_spin.config.load import from_mapping
from nemo_spin.data.columns import PREPARED
from nemo_spin.data.files import write_manifest
from nemo_spin.generation import passes
from nemo_spin.generation.passes import PROMPTS_NAME, request_of

ROWS = 20


def _prepared(directory: Path) -> Path:
    directory.mkdir()
    rows = [
        {"id": f"{n}", "prompt_ids": [n], "real_ids": [2], "prompt_text": "", "real_text": ""}
        for n in range(ROWS)
    ]
    for split in ("train", "heldout"):
        pq.write_table(pa.Table.from_pylist(rows, PREPARED), directory / f"{split}.parquet")
    counts = {"stop_token_ids": [2]}
    write_manifest(directory, stage="prepare", files=[], inputs={}, counts=counts)
    return directory


def _asked(directory: Path, prepared: Path, iteration: int, num_prompts: object) -> dict[str, list[str]]:
    """Split -> ids of the prompts that a request names, over all of its shards."""
    spin = {"num_prompts": num_prompts, "iterations": 2}
    config = from_mapping({"spin": spin, "generation": {"shard_rows": 4}})
    if passes.answers_some(config, iteration):
        passes.write_prompts(config, prepared / "train.parquet", directory / PROMPTS_NAME, iteration)
    plans = passes.split_passes(config, prepared, out_dir=directory, iteration=iteration, opponent_sha256="a")
    asked = {}
    for plan in plans:
        ids = pq.read_table(plan.prepared)["id"].to_pylist()
        shards = request_of(config, plan).shards
        asked[plan.name] = [name for shard in shards for name in ids[shard.start : shard.start + shard.rows]]
    return asked


def test_some_prompts_drawn_anew_in_each_iteration(tmp_path: Path) -> None:
    prepared = _prepared(tmp_path / "data")
    every = [f"{n}" for n in range(ROWS)]
    first, second = (_asked(tmp_path / f"{i}", prepared, i, 7) for i in (0, 1))
    for asked in (first, second):
        assert asked["heldout"] == every
        assert len(asked["train"]) == 7 and asked["train"] == sorted(asked["train"], key=int)
    assert first["train"] != second["train"]
    assert _asked(tmp_path / "again", prepared, 0, 7) == first
    assert _asked(tmp_path / "list", prepared, 1, [3, 7]) == second
    assert _asked(tmp_path / "all", prepared, 0, None) == {"train": every, "heldout": every}
    assert _asked(tmp_path / "more", prepared, 0, 99)["train"] == every
