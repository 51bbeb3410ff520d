"""What is answered in a stage, and how: its prompts cut into shards, and the shards read back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nemo_spin.config.iterations import at_iteration
from nemo_spin.config.schema import Config
from nemo_spin.data.columns import GENERATED
from nemo_spin.data.files import atomic_path, read_manifest
from nemo_spin.data.mixture import chosen
from nemo_spin.data.pairs import read_prepared
from nemo_spin.data.row_writer import ROW_GROUP_ROWS
from nemo_spin.errors import DataError, explain
from nemo_spin.generation.engine import Sampling
from nemo_spin.generation.request import Pass
from nemo_spin.generation.shards import PreparedRows, plan_shards, shard_damage

SPLITS = ("train", "heldout")
PROMPTS_NAME = "prompts.parquet"  # of the iteration, where it does not answer all of them


@dataclass(frozen=True)
class PassPlan:
    """One set of prompts and one way to answer them.

    Attributes:
        name: Begins the names of its shards.
        prepared: Parquet file with the prompts.
        num_prompts: Its first rows; None: all.
        sampling: How answers are drawn.
        num_generations: Answers for each prompt.
        iteration: Number of the iteration, also for the seeds.
        model_sha256: Hash of the model that answers.
    """

    name: str
    prepared: Path
    num_prompts: int | None
    sampling: Sampling
    num_generations: int
    iteration: int
    model_sha256: str


def answers_some(config: Config, iteration: int) -> bool:
    """Whether an iteration answers a part of the training prompts (`spin.num_prompts`)."""
    return at_iteration(config.spin.num_prompts, iteration) is not None


def write_prompts(config: Config, prepared: Path, path: Path, iteration: int) -> None:
    """The prepared rows of `spin.num_prompts` prompts, drawn anew in each iteration."""
    rows = read_prepared(prepared)
    number = at_iteration(config.spin.num_prompts, iteration)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
        drawn = chosen(rows.num_rows, number, seed=(config.seed, iteration))
        pq.write_table(rows.take(pa.array(drawn)), partial, row_group_size=ROW_GROUP_ROWS)


def configured_sampling(config: Config, prepared: Path, iteration: int) -> Sampling:
    """How answers are drawn in `iteration`, as `generation` says.

    Raises:
        DataError: The prepared data does not say at which ids an answer ends.
    """
    manifest = read_manifest(prepared)
    ends = None if manifest is None else manifest.counts.get("stop_token_ids")
    if not ends:
        raise DataError(
            explain(
                str(prepared / "manifest.json"),
                found="is missing" if manifest is None else "names no stop_token_ids",
                rule="prepared data says at which token ids an answer ends",
                remedy="run `nemo-spin prepare` first; if it was, remove the directory and run it again",
            )
        )
    generation = config.generation
    return Sampling(
        temperature=float(at_iteration(generation.temperature, iteration)),
        top_p=float(at_iteration(generation.top_p, iteration)),
        top_k=generation.top_k,
        max_tokens=generation.max_tokens,
        stop_token_ids=tuple(sorted({*ends, *generation.stop_token_ids})),
    )


def sound_tables(out_dir: Path, request: Pass) -> Iterator[pa.Table]:
    """The shards of a pass, in order, each checked before it is given.

    Raises:
        DataError: A shard is missing or damaged.
    """
    prepared = PreparedRows(Path(request.prepared))
    for shard in request.shards:
        path = out_dir / shard.file
        damage = shard_damage(path, shard, request, prepared) if path.exists() else "is missing"
        if damage is not None:
            raise DataError(
                explain(
                    str(path),
                    found=damage,
                    rule="every shard holds the answers to its prompts",
                    remedy="start the same command again: the shard is made again",
                )
            )
        yield pq.read_table(path, schema=GENERATED, partitioning=None)


def split_passes(
    config: Config, prepared: Path, *, out_dir: Path, iteration: int, opponent_sha256: str
) -> list[PassPlan]:
    """The passes of the generate stage: one for each split that was prepared.

    Raises:
        DataError: As `configured_sampling`.
    """
    sampling = configured_sampling(config, prepared, iteration)
    files = {split: prepared / f"{split}.parquet" for split in SPLITS}
    if answers_some(config, iteration):
        files["train"] = out_dir / PROMPTS_NAME
    return [
        PassPlan(
            name=split,
            prepared=path.absolute(),
            num_prompts=None,
            sampling=sampling,
            num_generations=config.generation.num_generations,
            iteration=iteration,
            model_sha256=opponent_sha256,
        )
        for split, path in files.items()
        if path.exists()
    ]


def request_of(config: Config, plan: PassPlan) -> Pass:
    """A pass as the sampler gets it: with its shards and the configured seed."""
    rows = PreparedRows(plan.prepared).num_rows
    return Pass(
        name=plan.name,
        prepared=str(plan.prepared),
        sampling=plan.sampling,
        num_generations=plan.num_generations,
        seed=config.seed,
        iteration=plan.iteration,
        opponent_sha256=plan.model_sha256,
        shards=plan_shards(plan.name, min(rows, plan.num_prompts or rows), config.generation.shard_rows),
    )
