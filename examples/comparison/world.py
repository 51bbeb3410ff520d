"""What self-play starts from: the quickstart's base model, and a seed's demonstrations and theta_0."""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import LlamaForCausalLM

from examples.comparison.training import fine_tuned
from examples.quickstart import base_model, task
from nemo_spin.config.load import load_config
from nemo_spin.config.schema import Config
from nemo_spin.data.columns import PREPARED
from nemo_spin.data.templates import Template, load_template

QUICKSTART = Path(__file__).parents[1] / "quickstart"
SIZES = {"heldout": 512, "train": 1024, "pretrain": 51_200}
SMALL = {"heldout": 8, "train": 16, "pretrain": 32}
SMALL_OVERRIDES = ("model.global_batch_size=8", "generation.max_tokens=4", "spin.iterations=2")
QUICKSTART_SEED = 1234
_PLACES = ("run_dir", "model.path", "data.train", "data.heldout", "sft.output")  # no file is used


@dataclass(frozen=True)
class Regime:
    """From what theta_0 is made, and so what self-play has to learn from.

    Attributes:
        name: For tables.
        demonstrations: How many of them; None: all.
        mistakes: Share of demonstrations with two letters exchanged.
        sft: Overrides of the quickstart's sft.yaml, which makes theta_0.
    """

    name: str = "quickstart"
    demonstrations: int | None = None
    mistakes: float = 0.0
    sft: tuple[str, ...] = ()


@dataclass(frozen=True)
class World:
    """A seed's data, and the base model that all seeds share.

    Attributes:
        seed: Of its data, of fine-tuning, sampling and self-play.
        template: Its tokenizer and chat template.
        train, heldout: Prepared rows (columns.PREPARED).
        base: The model that theta_0 is fine-tuned from.
        overrides: Of all configurations.
    """

    seed: int
    template: Template
    train: pa.Table
    heldout: pa.Table
    base: Any
    overrides: tuple[str, ...] = ()

    def demonstrations(self, regime: Regime) -> pa.Table:
        """The demonstrations that theta_0 and self-play are trained on."""
        rows = self.train.slice(0, regime.demonstrations)
        if not regime.mistakes:
            return rows
        chance = random.Random(self.seed)
        texts = [task.careless(text, chance, regime.mistakes) for text in rows["real_text"].to_pylist()]
        ids = [self.template.real_ids(text) for text in texts]
        return rows.set_column(2, "real_ids", [ids]).set_column(4, "real_text", [texts]).cast(PREPARED)

    def settings(self, name: str, *overrides: str) -> Config:
        """The quickstart's configuration `name` with a user's overrides, and this seed."""
        return settings(name, f"seed={self.seed}", *self.overrides, *overrides)

    def theta_0(self, regime: Regime) -> Any:
        """The model that self-play starts from."""
        return fine_tuned(self.base, self.demonstrations(regime), self.settings("sft", *regime.sft))[0]


@functools.lru_cache
def settings(name: str, *overrides: str) -> Config:
    """The quickstart's configuration `name`, with a user's overrides."""
    os.environ.setdefault("QUICKSTART_DIR", ".")
    return load_config(str(QUICKSTART / f"{name}.yaml"), [*(f"{key}=." for key in _PLACES), *overrides])


def make_base(directory: Path, sizes: dict[str, int], overrides: tuple[str, ...] = ()) -> None:
    """The quickstart's task, tokenizer and base model, unless they are in `directory` already."""
    if directory.exists():
        return
    partial = directory.with_name(f".{directory.name}")
    shutil.rmtree(partial, ignore_errors=True)
    task.write_task(partial, sizes, mistakes=0.5, seed=QUICKSTART_SEED)
    tokenizer = base_model.train_tokenizer(partial / "train.jsonl", vocab_size=384)
    tokenizer.save_pretrained(partial)
    config = settings("pretrain", f"seed={QUICKSTART_SEED}", *overrides)
    rows = prepared(partial / "pretrain.jsonl", load_template(config.data, partial))
    base, _ = fine_tuned(base_model.random_model(tokenizer, QUICKSTART_SEED), rows, config)
    base.save_pretrained(partial)
    partial.rename(directory)


def world(seed: int, base: Path, sizes: dict[str, int], overrides: tuple[str, ...] = ()) -> World:
    """A seed's demonstrations and held-out prompts, beside what `make_base` left in `base`."""
    template = load_template(settings("quickstart").data, base)
    with tempfile.TemporaryDirectory() as scratch:
        directory = base if seed == QUICKSTART_SEED else Path(scratch)
        if directory != base:
            write_block(directory, sizes, number=seed - QUICKSTART_SEED - 1)
        return World(
            seed=seed,
            template=template,
            train=prepared(directory / "train.jsonl", template),
            heldout=prepared(directory / "heldout.jsonl", template),
            base=LlamaForCausalLM.from_pretrained(base, local_files_only=True),
            overrides=overrides,
        )


def write_block(directory: Path, sizes: dict[str, int], *, number: int) -> None:
    """Chats for a seed of its own: instructions that neither the quickstart nor another seed has."""
    assert number >= 0, "seeds begin with the quickstart's"
    block = sizes["heldout"] + sizes["train"]
    start = sum(sizes.values()) + number * block
    pairs = list(itertools.islice(task.instructions(QUICKSTART_SEED), start, start + block))
    task.write_chats(directory / "heldout.jsonl", pairs[: sizes["heldout"]])
    task.write_chats(directory / "train.jsonl", pairs[sizes["heldout"] :])


def prepared(path: Path, template: Template) -> pa.Table:
    """The chats of a file as prepared rows: the project's template and end token."""
    chats = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    encoded = template.encode([chat["messages"] for chat in chats])
    rows = [
        {"id": chat["id"], **{name: getattr(row, name) for name in PREPARED.names[1:]}}
        for chat, row in zip(chats, encoded, strict=True)
    ]
    return pa.Table.from_pylist(rows, PREPARED)
