"""Answers that come with the demonstrations, in the place of an opponent's: no sampler is started."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nemo_spin.config.iterations import at_iteration
from nemo_spin.config.schema import Config
from nemo_spin.data.columns import GENERATED
from nemo_spin.data.files import Manifest, atomic_path, read_manifest, write_manifest
from nemo_spin.data.mixture import chosen
from nemo_spin.data.pairs import read_given
from nemo_spin.generation.counts import count_answers
from nemo_spin.generation.shards import plan_shards


def write_given(
    config: Config,
    *,
    prepared: Path,
    out_dir: Path,
    iteration: int,
    opponent_sha256: str,
    inputs: Mapping[str, Any],
) -> Manifest:
    """Writes shards and manifest as the sampler's stage does, of the answers in the prepared rows.

    They have no sampler's log-probabilities: `num_sampler_tokens` is 0.

    Args:
        config: The configuration, with `data.use_generations`.
        prepared: Directory with the prepared rows.
        out_dir: Where the shards go.
        iteration: The one whose opponent they stand for.
        opponent_sha256: Hash of that opponent, which they are scored under.
        inputs: What the result depends on.

    Raises:
        DataError: The prepared rows cannot be read.
    """
    manifest = read_manifest(prepared)
    ends = manifest.counts["stop_token_ids"] if manifest else []
    number = at_iteration(config.spin.num_prompts, iteration)
    files: list[str] = []
    counts: dict[str, Any] = {}
    for split in ("train", "heldout"):
        path = prepared / f"{split}.parquet"
        if not path.exists():
            continue
        rows = read_given(path)
        if split == "train" and number is not None:
            rows = rows.take(pa.array(chosen(rows.num_rows, number, seed=(config.seed, iteration))))
        answers = _answers(rows, ends, iteration=iteration, opponent_sha256=opponent_sha256)
        for shard in plan_shards(split, rows.num_rows, config.generation.shard_rows):
            with atomic_path(out_dir / shard.file) as partial:
                part = answers.slice(shard.start, shard.rows)
                pq.write_table(part, partial, compression="zstd", write_page_checksum=True)
            files.append(shard.file)
        counts[split] = count_answers([answers])
    return write_manifest(out_dir, stage="generate", files=files, inputs=inputs, counts=counts)


def _answers(rows: pa.Table, ends: list[int], *, iteration: int, opponent_sha256: str) -> pa.Table:
    last = _last(rows["given_ids"])
    columns = {
        "id": rows["id"],
        "sample": pa.array([0] * rows.num_rows, pa.int32()),
        "iteration": pa.array([iteration] * rows.num_rows, pa.int32()),
        "prompt_ids": rows["prompt_ids"],
        "real_ids": rows["real_ids"],
        "generated_ids": rows["given_ids"],
        "finish_reason": pc.if_else(pc.is_in(last, pa.array(ends, pa.int32())), "stop", "length"),
        "sampler_logps": pa.array([0.0] * rows.num_rows, pa.float64()),
        "num_sampler_tokens": pa.array([0] * rows.num_rows, pa.int32()),
        "opponent_sha256": pa.array([opponent_sha256] * rows.num_rows, pa.string()),
    }
    return pa.table(columns).cast(GENERATED)


def _last(column: pa.ChunkedArray) -> pa.Array:
    """The last token of each list, none of which is empty."""
    lists = column.combine_chunks()
    return lists.values.take(pa.array(lists.offsets.to_numpy()[1:] - 1))
