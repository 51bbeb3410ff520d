"""What a model card says of the training behind it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_spin.config.schema import Config, DataConfig
from nemo_spin.data.files import write_manifest
from nemo_spin.selfplay.ranks.facts import training_facts
from nemo_spin.selfplay.run_directory import RunDirectory


def context(tmp_path: Path, iteration: int | None, **data: Any) -> Any:
    """As much of a rank's context as the facts come from, with two manifests."""
    run = RunDirectory(tmp_path)
    here = run.at(iteration)
    prepared = {"train": {"rows": 40, "quarantined": 1}, "heldout": {"rows": 12}}
    inputs = {"train": "0" * 64, "config": {"format": "messages", "prompt_template": None}}
    run.data_dir.mkdir(parents=True)
    write_manifest(run.data_dir, stage="prepare", files=[], inputs=inputs, counts=prepared)
    settings = {"spin.beta": 0.5, "spin.loss": "/home/me/losses.py:mine", "model.fp8": None}
    counts = {
        "steps": 7,
        "pairs": 3000001.0,
        "loss": 0.6931471805,
        "train_seconds": 9.5,
        "heldout_margin": None,
    }
    here.train.mkdir(parents=True)
    write_manifest(here.train, stage="train", files=[], inputs={"config": settings}, counts=counts)
    return SimpleNamespace(config=Config(data=DataConfig(**data)), run=run, here=here)


def test_settings_and_metrics_are_those_of_the_stages_before(tmp_path: Path) -> None:
    facts = training_facts(context(tmp_path, 2, train="org/chats", subset="clean", revision="abc"))
    assert facts == {
        "data": {"train": "org/chats, clean, train, abc", "train rows": 40},
        "settings": {"data.format": "messages", "spin.beta": 0.5, "spin.loss": "losses.py:mine"},
        "metrics": {"steps": 7, "pairs": 3000001, "loss": 0.693147},
    }


def test_files_are_named_without_their_place(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("{}")
    (tmp_path / "folder").mkdir()
    sources = {"train": str(tmp_path / "mine.jsonl"), "heldout": str(tmp_path / "folder")}
    facts = training_facts(context(tmp_path, None, **sources))
    assert facts["data"] == {"train": "mine.jsonl", "train rows": 40, "heldout": "folder", "heldout rows": 12}
