"""`nemo-spin prepare --to spin-parquet`: what the official code, uclaml/SPIN, goes on from.

A folder for each iteration that has answered, with the demonstrations and the answers as
messages; before there is one, the demonstrations with empty answers, as the official code
samples from. The messages are those of the data, read again; answers are the sampled
tokens as text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from nemo_spin.config.schema import Config, DataConfig
from nemo_spin.data.columns import GENERATED
from nemo_spin.data.encode import rows_of
from nemo_spin.data.files import atomic_path, read_manifest
from nemo_spin.data.official import PAIRS, parquet_path
from nemo_spin.data.pairs import iter_shards, prepared_rows
from nemo_spin.data.row_writer import RowWriter, UniqueIds
from nemo_spin.data.rows import Message, RefusedError, conversation_of, needed_columns, row_id
from nemo_spin.data.sources import open_source
from nemo_spin.data.templates import load_tokenizer
from nemo_spin.errors import ConfigError, explain
from nemo_spin.selfplay.preflight import find_model
from nemo_spin.selfplay.run_directory import RunDirectory

SPIN_PARQUET = "spin-parquet"
_BATCH = 512


def write_official(config: Config, output: Path | None) -> list[Path]:
    """Writes the folders; returns them. The run's data must be prepared.

    Args:
        config: Of the run.
        output: The folder above them; None: `spin-parquet` in the run directory.

    Raises:
        DataError: The demonstrations or the answers cannot be read.
        ConfigError: The data are not prepared.
    """
    run = RunDirectory(Path(config.run_dir).expanduser().absolute())
    if read_manifest(run.data_dir) is None:
        raise ConfigError(
            explain(
                str(run.data_dir),
                found="holds no prepared data",
                rule="what is written for the official code is what is trained on here",
                remedy="run `nemo-spin prepare` first",
            )
        )
    target = output or run.path / SPIN_PARQUET
    answered = [i for i in run.existing_iterations() if read_manifest(run.iteration(i).generated)]
    if not answered:
        _write(config, run, None, target)
        return [target]
    for iteration in answered:
        _write(config, run, iteration, target / f"iter{iteration}")
    return [target / f"iter{iteration}" for iteration in answered]


def _write(config: Config, run: RunDirectory, iteration: int | None, folder: Path) -> None:
    tokenizer = load_tokenizer(find_model(config.model.path))
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "heldout"):
        if not (run.data_dir / f"{split}.parquet").exists():
            continue
        answers = _answers(run, iteration, split, tokenizer)
        with atomic_path(parquet_path(folder, split)) as partial, RowWriter(partial, PAIRS) as writer:
            batch: list[dict[str, Any]] = []
            for name, messages in _demonstrations(config.data, run, split):
                prompt = messages[:-1]
                for text in answers[name] if answers is not None else [""]:
                    generated = [*prompt, {"role": "assistant", "content": text}]
                    batch.append({"real": messages, "generated": generated})
                if len(batch) >= _BATCH:
                    writer.write(pa.RecordBatch.from_pylist(batch, PAIRS))
                    batch = []
            writer.write(pa.RecordBatch.from_pylist(batch, PAIRS))


def _demonstrations(data: DataConfig, run: RunDirectory, split: str) -> Iterator[tuple[str, list[Message]]]:
    """(id, messages) of the rows that were accepted, in their order, by the ids that `prepare` gave them."""
    accepted = set(prepared_rows(run.data_dir, split)["id"].to_pylist())
    spec, hub_split = (data.train, data.train_split), (data.heldout or "", data.heldout_split)
    name, part = spec if split == "train" else hub_split
    source = open_source(name, key=f"data.{split}", split=part, config=data)
    unique, left = UniqueIds(), len(accepted)
    for piece, _ in source.pieces(needed_columns(data)):
        for _, row in rows_of(piece):
            try:
                messages = conversation_of(row, data)
                own = row_id(row, messages, data)
            except RefusedError:
                continue
            if own not in accepted:
                continue
            found = unique(own)
            if found in accepted and left:
                left -= 1
                yield found, messages


def _answers(
    run: RunDirectory, iteration: int | None, split: str, tokenizer: Any
) -> defaultdict[str, list[str]] | None:
    """Id -> answers as text, without the token that ended them; None before there are any."""
    if iteration is None:
        return None
    answers: defaultdict[str, list[str]] = defaultdict(list)
    for table in iter_shards(run.iteration(iteration).generated, split, schema=GENERATED):
        columns = (table[name].to_pylist() for name in ("id", "generated_ids", "finish_reason"))
        for name, ids, reason in zip(*columns, strict=True):
            body = ids[:-1] if reason == "stop" else ids
            answers[name].append(tokenizer.decode(body, skip_special_tokens=False))
    return answers
