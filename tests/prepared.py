"""Prepared rows as `prepare` leaves them, made in a moment: random prompts, random answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nemo_spin.data.columns import PREPARED
from nemo_spin.data.files import write_manifest

END_TOKEN = 3  # of `tests.models.write_tokenizer`
FIRST_WORD = 4


def rows(count: int, *, seed: int, vocab_size: int = 290, longest: int = 20) -> list[dict[str, object]]:
    """Rows with prompts of 1 to `longest` tokens and answers of up to 10, the end token included."""
    chance = random.Random(seed)

    def words(number: int) -> list[int]:
        return [chance.randrange(FIRST_WORD, vocab_size) for _ in range(number)]

    return [
        {
            "id": f"row-{seed}-{index}",
            "prompt_ids": words(chance.randint(1, longest)),
            "real_ids": [*words(chance.randint(1, 9)), END_TOKEN],
            "prompt_text": f"prompt {index}",
            "real_text": f"answer {index}",
        }
        for index in range(count)
    ]


def write(
    directory: Path,
    *,
    train: Sequence[dict[str, object]] = (),
    heldout: Sequence[dict[str, object]] = (),
    stop_token_ids: Sequence[int] = (END_TOKEN,),
    row_group_size: int = 16,
) -> Path:
    """A `data` directory with the splits that have rows."""
    directory.mkdir(parents=True, exist_ok=True)
    files = []
    for split, content in (("train", train), ("heldout", heldout)):
        if content:
            table = pa.Table.from_pylist(list(content), schema=PREPARED)
            pq.write_table(table, directory / f"{split}.parquet", row_group_size=row_group_size)
            files.append(f"{split}.parquet")
    counts = {"stop_token_ids": list(stop_token_ids), "end_token_id": END_TOKEN}
    write_manifest(directory, stage="prepare", files=files, inputs={}, counts=counts)
    return directory
