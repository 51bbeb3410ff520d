"""The texts one can browse: prompts, demonstrations, and what every model answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nemo_spin.data.files import read_manifest
from nemo_spin.data.pairs import shard_paths
from nemo_spin.data.tokenizer_files import load_tokenizer
from nemo_spin.errors import NemoSpinError
from nemo_spin.report.metrics import short
from nemo_spin.report.notes import Notes
from nemo_spin.report.pair_values import SPLITS, PairValues
from nemo_spin.report.sources import PartSource, RunSource

MAX_CHARACTERS = 4000  # of one text; the rest is counted
MAX_SAMPLES = 4  # answers of one model to one prompt

Place = tuple[str, str]  # split and id of a prompt: ids are unique within a split only
Places = dict[Place, int]  # -> its position in the columns of `Samples`

DRAWN = "drawn"  # an answer that was trained on (or drawn beside them, held out)


@dataclass
class Samples:
    """Columns of prompts; `answers` holds a list of answers for each.

    An answer is a mapping with short keys, since there may be hundreds of thousands:
    `m` number of the model (0 is theta_0), `k` kind (drawn | sampled | greedy), `t` text;
    where known: `n` tokens, `c` 1 if cut by a limit, `e` 1 if it is the demonstration,
    `s` score, `g` margin, `d` change of the demonstration's log-probability.
    """

    ids: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    reals: list[str] = field(default_factory=list)
    answers: list[list[dict[str, Any]]] = field(default_factory=list)
    available: dict[str, int] = field(default_factory=dict)

    def as_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "id": self.ids,
            "split": self.splits,
            "prompt": self.prompts,
            "real": self.reals,
            "answers": self.answers,
            "available": self.available,
        }


def collect_samples(run: RunSource, values: Sequence[PairValues], *, limit: int, notes: Notes) -> Samples:
    """Prompts of a run, evenly spread, a quarter of them held out, with all answers to them.

    Args:
        run: The run.
        values: What is known of the pairs, for each of its parts.
        limit: Prompts at most.
        notes: Told what could not be read.
    """
    samples = Samples()
    places: Places = {}
    with notes.instead_of_failing("samples"):
        _add_prompts(samples, places, run.data_dir, limit)
    if not places:
        return samples
    tokenizer = _tokenizer(run, notes)
    for part, of_pairs in zip(run.parts, values, strict=True):
        if part.iteration is None:
            continue
        label = f"iteration {part.iteration}"
        if tokenizer is not None:
            with notes.instead_of_failing(f"answers of {label}"):
                _add_drawn(samples, places, part, of_pairs, tokenizer)
        if part.iteration == 0:
            with notes.instead_of_failing("held-out answers of theta_0"):
                _add_evaluated(samples, places, part.paths.opponent_evaluation, model=0)
        with notes.instead_of_failing(f"held-out answers after {label}"):
            _add_evaluated(samples, places, part.paths.evaluation, model=part.iteration + 1)
    return samples


def _add_prompts(samples: Samples, places: Places, data_dir: Path, limit: int) -> None:
    manifest = read_manifest(data_dir)
    if manifest is None:
        return
    paths = {split: data_dir / f"{split}.parquet" for split in SPLITS if f"{split}.parquet" in manifest.files}
    samples.available = {split: pq.read_metadata(path).num_rows for split, path in paths.items()}
    heldout = samples.available.get("heldout", 0)
    train = samples.available.get("train", 0)
    shown = {"heldout": min(heldout, max(limit // 4, limit - train))}
    shown["train"] = min(train, limit - shown["heldout"])
    for split, path in paths.items():
        table = pq.read_table(path, columns=["id", "prompt_text", "real_text"], partitioning=None)
        table = table.take(pa.array(_spread(table.num_rows, shown[split])))
        for row_id in table["id"].to_pylist():
            places[split, row_id] = len(samples.ids)
            samples.ids.append(row_id)
        samples.splits += [split] * table.num_rows
        samples.prompts += [clipped(text) for text in table["prompt_text"].to_pylist()]
        samples.reals += [clipped(text) for text in table["real_text"].to_pylist()]
    samples.answers = [[] for _ in samples.ids]


def _ids(places: Places, split: str) -> pa.Array:
    return pa.array([row_id for of_split, row_id in places if of_split == split], pa.string())


def _spread(count: int, wanted: int) -> np.ndarray:
    """`wanted` of `count` positions, evenly spread, the same every time."""
    return np.unique(np.linspace(0, max(count - 1, 0), wanted).round().astype(np.int64))


def _tokenizer(run: RunSource, notes: Notes) -> Any:
    """Any of the run's models has it; the first directory that can be read is taken."""
    problem: NemoSpinError | None = None
    for part in run.parts:
        for directory in (part.paths.opponent, part.paths.model):
            if not directory.exists():
                continue
            try:
                return load_tokenizer(directory)
            except NemoSpinError as error:
                problem = error
    if problem is not None:
        notes.add(f"texts of the answers: not in this report ({str(problem).splitlines()[0]})")
    return None


def _add_drawn(
    samples: Samples, places: Places, part: PartSource, values: PairValues, tokenizer: Any
) -> None:
    """What theta_t answered in its iteration, with the margins that training gave these pairs."""
    assert part.iteration is not None, "plain fine-tuning draws nothing"
    if read_manifest(part.paths.generated) is None:
        return
    margins = _margins(values)
    changes = {
        (split, row_id): change
        for split, table in values.real_changes.items()
        for row_id, change in zip(table["id"].to_pylist(), table["change"].to_pylist(), strict=True)
    }
    columns = ["id", "sample", "real_ids", "generated_ids", "finish_reason"]
    for split in SPLITS:
        wanted = _ids(places, split)
        for path in shard_paths(part.paths.generated, split):
            table = pq.read_table(path, columns=columns, partitioning=None)
            mask = pc.and_(pc.is_in(table["id"], wanted), pc.less(table["sample"], MAX_SAMPLES))
            rows = table.filter(mask).to_pylist()
            texts = _texts(tokenizer, rows)
            for row, text in zip(rows, texts, strict=True):
                answer: dict[str, Any] = {
                    "m": part.iteration,
                    "k": DRAWN,
                    "t": clipped(text),
                    "n": len(row["generated_ids"]),
                }
                _flag(
                    answer,
                    cut=row["finish_reason"] == "length",
                    equal=row["generated_ids"] == row["real_ids"],
                )
                _number(answer, "g", margins.get((split, row["id"], row["sample"])))
                _number(answer, "d", changes.get((split, row["id"])))
                samples.answers[places[split, row["id"]]].append(answer)


def _margins(values: PairValues) -> dict[tuple[str, str, int], float]:
    """By split, id and sample; those of training pairs are all that is known."""
    table = values.margins
    if table is None:
        return {}
    keys = zip(table["id"].to_pylist(), table["sample"].to_pylist(), strict=True)
    margins = table["margin"].to_pylist()
    return {("train", *key): margin for key, margin in zip(keys, margins, strict=True)}


def _texts(tokenizer: Any, rows: list[dict[str, Any]]) -> list[str]:
    """Answers as texts, without the token that ended them; other special tokens stay visible."""
    bodies = [
        row["generated_ids"][:-1] if row["finish_reason"] == "stop" else row["generated_ids"] for row in rows
    ]
    if not bodies:
        return []
    texts: list[str] = tokenizer.batch_decode(
        bodies, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return texts


def _add_evaluated(samples: Samples, places: Places, directory: Path, *, model: int) -> None:
    """Held-out answers, sampled and greedy, with the scores that a scorer gave them."""
    if read_manifest(directory) is None:
        return
    columns = ["pass", "id", "real_text", "response_text", "score", "finish_reason", "num_sampler_tokens"]
    for path in sorted(directory.glob("evaluation.parquet")):
        table = pq.read_table(path, columns=columns, partitioning=None)
        table = table.filter(pc.is_in(table["id"], _ids(places, "heldout")))
        for row in table.to_pylist():
            answer: dict[str, Any] = {
                "m": model,
                "k": row["pass"],
                "t": clipped(row["response_text"]),
                "n": row["num_sampler_tokens"],
            }
            equal = row["response_text"].strip() == row["real_text"].strip()
            _flag(answer, cut=row["finish_reason"] == "length", equal=equal)
            _number(answer, "s", row["score"])
            samples.answers[places["heldout", row["id"]]].append(answer)


def _flag(answer: dict[str, Any], *, cut: bool, equal: bool) -> None:
    if cut:
        answer["c"] = 1
    if equal:
        answer["e"] = 1


def _number(answer: dict[str, Any], key: str, value: float | None) -> None:
    if value is not None:
        answer[key] = short(value)


def clipped(text: str) -> str:
    """`text`, or its beginning and how much more there is."""
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]} … (+{len(text) - MAX_CHARACTERS:,} characters)"
