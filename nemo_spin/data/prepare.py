"""Demonstrations to token ids, once for all iterations.

Rows stream from the source through workers into parquet files whose bytes depend on the
data, the tokenizer and the settings only: not on how many processes there were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from nemo_spin.config.schema import DataConfig
from nemo_spin.data.columns import PREPARED, QUARANTINED
from nemo_spin.data.encode import schema_of
from nemo_spin.data.files import MANIFEST_NAME, Manifest, atomic_path, remove_partials, write_manifest
from nemo_spin.data.inputs import prepare_inputs
from nemo_spin.data.overlap import PromptOverlap
from nemo_spin.data.overlong import OverlongRows, RowLimit
from nemo_spin.data.progress import Progress, SilentProgress
from nemo_spin.data.row_writer import RowWriter, UniqueIds
from nemo_spin.data.rows import FORMATS, needed_columns
from nemo_spin.data.sources import Piece, Source, open_source
from nemo_spin.data.split_counts import SplitCounts
from nemo_spin.data.templates import load_template
from nemo_spin.data.workers import Workers
from nemo_spin.data.worth_knowing import overlap_note
from nemo_spin.errors import ConfigError, DataError, explain

STAGE = "prepare"
QUARANTINE_NAME = "quarantine.parquet"


def prepare(
    config: DataConfig,
    *,
    tokenizer_dir: Path,
    out_dir: Path,
    row_limit: RowLimit | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Writes `train.parquet`, `heldout.parquet` (where configured), the quarantine and the manifest.

    Args:
        config: Where the demonstrations are and how they become token ids.
        tokenizer_dir: Hugging Face directory whose tokenizer and chat template are used.
        out_dir: Gets the files. Whatever an earlier call left there is replaced.
        row_limit: Rows whose units exceed it are counted and reported, and kept all the same.
        progress: Is told the rows done, and what was refused.

    Raises:
        ConfigError: The settings or the tokenizer cannot be used.
        DataError: The data cannot be read, is empty, lacks a column, or too many of its
            rows were refused; `quarantine.parquet` then says which and why.
        StageError: A tokenizing process ended before its time.
    """
    progress = progress or SilentProgress()
    _check_settings(config)
    sources = _open_sources(config)
    inputs = prepare_inputs(config, tokenizer_dir)
    template = load_template(config, tokenizer_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    remove_partials(out_dir)
    counts = {
        split: SplitCounts(overlong=None if row_limit is None else OverlongRows(row_limit))
        for split in sources
    }
    overlap = PromptOverlap()
    with contextlib.ExitStack() as stack:
        paths = {split: stack.enter_context(atomic_path(out_dir / f"{split}.parquet")) for split in sources}
        with (
            atomic_path(out_dir / QUARANTINE_NAME) as quarantine_path,
            RowWriter(quarantine_path, QUARANTINED) as quarantine,
            Workers(config, tokenizer_dir=tokenizer_dir, template=template) as workers,
        ):
            for split, source in sources.items():
                with RowWriter(paths[split], schema_of(config)) as writer:
                    _prepare_split(
                        _first_rows(source.pieces(needed_columns(config)), config.max_rows),
                        split=split,
                        workers=workers,
                        writer=writer,
                        quarantine=quarantine,
                        counts=counts[split],
                        overlap=overlap,
                        progress=progress,
                    )
            # Until here all that an earlier call left is unharmed.
            (out_dir / MANIFEST_NAME).unlink(missing_ok=True)
        for split, count in counts.items():
            _report(split, count, progress)
            _check_share(split, count, config=config, quarantine_path=out_dir / QUARANTINE_NAME)
        summaries = {split: count.summary() for split, count in counts.items()}
        if "heldout" in summaries:
            summaries["heldout"]["also_in_train"] = overlap.count()
        if note := overlap_note(summaries):
            progress.note(note)
    return write_manifest(
        out_dir,
        stage=STAGE,
        files=[*(f"{split}.parquet" for split in sources), QUARANTINE_NAME],
        inputs=inputs,
        counts={
            **summaries,
            "end_token_id": template.end_token_id,
            "stop_token_ids": list(template.stop_token_ids),
        },
    )


def _prepare_split(
    pieces: Iterable[tuple[Piece, int]],
    *,
    split: str,
    workers: Workers,
    writer: RowWriter,
    quarantine: RowWriter,
    counts: SplitCounts,
    overlap: PromptOverlap,
    progress: Progress,
) -> None:
    unique = UniqueIds()
    for piece, total in workers.encode(iter(pieces)):
        names = [unique(name) for name in piece.batch.column("id").to_pylist()]
        writer.write(piece.batch.set_column(0, PREPARED.field("id"), pa.array(names, pa.string())))
        refused = [
            {"id": refusal.id, "row": refusal.row, "split": split, "reason": refusal.text}
            for refusal in piece.refusals
        ]
        quarantine.write(pa.RecordBatch.from_pylist(refused, QUARANTINED))
        counts.add(piece)
        overlap.add(split, piece.prompt_hashes)
        done = counts.all_rows
        progress.update(done, max(total, done), "rows", split=split, quarantined=counts.refused.total())
    progress.update(counts.all_rows, counts.all_rows, "rows", split=split, quarantined=counts.refused.total())


def _first_rows(pieces: Iterable[tuple[Piece, int]], max_rows: int | None) -> Iterable[tuple[Piece, int]]:
    """The pieces of the first `max_rows` rows."""
    left = max_rows
    for piece, total in pieces:
        if left is None or max_rows is None:
            yield piece, total
            continue
        yield piece.first(left), min(total, max_rows)
        left -= len(piece)
        if left <= 0:
            return


def _open_sources(config: DataConfig) -> dict[str, Source]:
    """Opens what is configured and checks that it has rows and columns, before any work is done."""
    specs = {"train": (config.train, config.train_split)}
    if config.heldout is not None:
        specs["heldout"] = (config.heldout, config.heldout_split)
    sources = {}
    for split, (spec, hub_split) in specs.items():
        key = f"data.{split}"
        sources[split] = open_source(spec, key=key, split=hub_split, config=config)
        columns = sources[split].columns()
        missing = [name for name in needed_columns(config) if name not in columns]
        if not columns:
            raise _empty(f"{key}={spec}")
        if missing:
            raise DataError(
                explain(
                    f"{key}={spec}",
                    found=f"has no column {', '.join(missing)}; its columns are {', '.join(columns)}",
                    rule=f"data.format={config.format} reads the columns {', '.join(needed_columns(config))}",
                    remedy="set data.format or the column names (data.messages_column, "
                    "data.prompt_column, data.response_column, data.id_column)",
                )
            )
    return sources


def _report(split: str, counts: SplitCounts, progress: Progress) -> None:
    if counts.refused:
        reasons = ", ".join(f"{number} {reason}" for reason, number in counts.refused.most_common())
        progress.note(
            f"{split}: {counts.refused.total()} of {counts.all_rows} rows refused ({reasons}); "
            f"see {QUARANTINE_NAME}"
        )
    note = counts.overlong.note(split, counts.rows) if counts.overlong is not None else None
    if note is not None:
        progress.note(note)


def _check_share(split: str, counts: SplitCounts, *, config: DataConfig, quarantine_path: Path) -> None:
    spec = config.train if split == "train" else config.heldout
    if not counts.all_rows:
        raise _empty(f"data.{split}={spec}")
    refused = counts.refused.total()
    share = refused / counts.all_rows
    if counts.rows and share <= config.max_quarantined_share:
        return
    reasons = ", ".join(f"{number} {reason}" for reason, number in counts.refused.most_common(3))
    raise DataError(
        explain(
            f"data.{split}={spec}",
            found=f"{refused} of {counts.all_rows} rows ({share:.1%}) were refused; most often: {reasons}",
            rule=f"at most data.max_quarantined_share={config.max_quarantined_share} of the rows, never all",
            remedy=f"look at {quarantine_path} (every refused row and its reason), mend the data or "
            "the settings, or allow a larger share",
        )
    )


def _empty(what: str) -> DataError:
    return DataError(
        explain(
            what,
            found="has no rows",
            rule="self-play needs demonstrations",
            remedy="check that the file (or the split) is the one that was meant",
        )
    )


def _check_settings(config: DataConfig) -> None:
    """The few settings that only this stage gives a meaning; a command checks all of them before."""
    allowed = {
        "format": FORMATS,
        "overlong_prompt": ("quarantine", "truncate_left"),
        "overlong_response": ("truncate", "quarantine"),
    }
    for key, values in allowed.items():
        value = getattr(config, key)
        if value not in values:
            raise ConfigError(
                explain(
                    f"data.{key}={value}",
                    found="is not known",
                    rule=f"one of {', '.join(values)}",
                    remedy="choose one of them",
                )
            )
