"""Checks prompts before a sampler sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nemo_spin.errors import DataError, explain
from nemo_spin.generation.request import Pass


@dataclass(frozen=True)
class PromptLengths:
    """Of the prompts of one file.

    Attributes:
        prompts: How many.
        longest: Tokens of the longest.
        crowded: How many leave less room for the answer than it may take.
    """

    prompts: int
    longest: int
    crowded: int


def check_prompts(
    path: Path, *, num_prompts: int | None, vocab_size: int, max_context: int, max_tokens: int
) -> PromptLengths:
    """Compares the prompts of a prepared file with what the model can take.

    Args:
        path: The prepared file.
        num_prompts: How many of its first rows count; None: all.
        vocab_size: Rows of the model's embedding.
        max_context: Tokens of the longest text the model can process.
        max_tokens: Tokens of the longest answer.

    Raises:
        DataError: A prompt is empty or leaves no room for an answer, an id is not in the
            vocabulary, or the file cannot be read.
    """
    prompts = longest = crowded = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=4096, columns=["id", "prompt_ids"]):
            if num_prompts is not None:
                batch = batch.slice(0, num_prompts - prompts)
            if batch.num_rows == 0:
                break
            _check_ids(path, batch, vocab_size)
            lengths = pc.list_value_length(batch["prompt_ids"])
            _check_lengths(path, batch, lengths, max_context)
            prompts += batch.num_rows
            longest = max(longest, pc.max(lengths).as_py())
            crowded += pc.sum(pc.greater(lengths, max_context - max_tokens)).as_py()
    except (OSError, pa.ArrowException, KeyError) as error:
        raise DataError(
            explain(
                str(path),
                found=f"cannot be read ({str(error).splitlines()[0][:200] if str(error) else 'damaged'})",
                rule="a parquet file as `prepare` wrote it",
                remedy=f"remove {path.parent} and start the same command again: it is prepared again",
            )
        ) from error
    return PromptLengths(prompts, longest, crowded)


def longest_first(passes: Sequence[Pass]) -> tuple[str, ...]:
    """The shards of all passes, those with the longest prompts first.

    They take longest and need the most memory: begun last, one would keep all waiting; and
    what does not fit shows at once.
    """
    longest: dict[str, int] = {}
    for generation in passes:
        read = pq.ParquetFile(generation.prepared).iter_batches(batch_size=4096, columns=["prompt_ids"])
        lengths = np.concatenate(
            [np.zeros(0, np.int64), *(pc.list_value_length(b[0]).to_numpy() for b in read)]
        )
        for shard in generation.shards:
            longest[shard.file] = int(lengths[shard.start : shard.start + shard.rows].max(initial=0))
    return tuple(sorted(longest, key=lambda name: -longest[name]))


def _check_ids(path: Path, batch: pa.RecordBatch, vocab_size: int) -> None:
    extremes = pc.min_max(batch["prompt_ids"].flatten()).as_py()
    if extremes["min"] is not None and not 0 <= extremes["min"] <= extremes["max"] < vocab_size:
        raise DataError(
            explain(
                str(path),
                found=f"has token ids from {extremes['min']} to {extremes['max']}",
                rule=f"the model has a vocabulary of {vocab_size}: ids are below it",
                remedy="use the tokenizer that belongs to model.path, and prepare the data with it",
            )
        )


def _check_lengths(path: Path, batch: pa.RecordBatch, lengths: pa.Array, max_context: int) -> None:
    bad = pc.or_(pc.greater(lengths, max_context - 1), pc.less(lengths, 1))
    count = pc.sum(bad).as_py()
    if count:
        row = pc.index(bad, True).as_py()
        raise DataError(
            explain(
                str(path),
                found=f"{count} or more prompts have no token or too many, such as "
                f"{batch['id'][row].as_py()} with {lengths[row].as_py()} tokens",
                rule=f"prompt and answer together have at most {max_context} tokens (the model's "
                "max_position_embeddings): a prompt must leave room for one more",
                remedy="lower data.max_prompt_length (data.overlong_prompt says what happens to longer ones)",
            )
        )
