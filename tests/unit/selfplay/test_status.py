from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_spin.data.files import write_manifest
from nemo_spin.errors import ConfigError
from nemo_spin.selfplay import state as states
from nemo_spin.selfplay.lock import Owner
from nemo_spin.selfplay.run_directory import RunDirectory
from nemo_spin.selfplay.state import StateFile
from nemo_spin.selfplay.status import describe


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path)
    run.data_dir.mkdir()
    write_manifest(run.data_dir, stage="prepare", files=[], inputs={}, counts={})
    state = StateFile(run.state_path)
    state.started("prepare", None)
    state.ended(states.DONE)
    run.iteration(0).logs.mkdir(parents=True)
    return run


def set_owner(run: RunDirectory, owner: Owner) -> None:
    raw = json.loads(run.state_path.read_text())
    raw["owner"] = owner.__dict__
    run.state_path.write_text(json.dumps(raw))


def test_what_is_running_and_how_far(run: RunDirectory) -> None:
    StateFile(run.state_path).started("train", 0)
    progress = run.iteration(0).logs / "train.progress.jsonl"
    lines = [{"event": "update", "done": 12, "total": 3000, "unit": "step", "values": {}}, {"event": "note"}]
    progress.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "upd')
    first, *rest = describe(run.path).splitlines()
    assert f"{run.path}: running train of iteration 0, for " in first
    assert ", 12/3,000 steps (process " in first
    assert "prepare done" in rest[0]
    assert "train begun" in rest[1]
    assert "export –" in rest[1]


def test_a_killed_run(run: RunDirectory) -> None:
    StateFile(run.state_path).started("train", 1)
    set_owner(run, replace(Owner.of_this_process(), started=1))
    assert "interrupted in train of iteration 1 (its process is gone" in describe(run.path)


def test_a_run_that_cannot_be_seen(run: RunDirectory) -> None:
    StateFile(run.state_path).started("train", 0)
    set_owner(run, replace(Owner.of_this_process(), host="node7", boot="other"))
    first = describe(run.path).splitlines()[0]
    assert "running train of iteration 0 (process" in first
    assert "on node7, which cannot be seen from here; last sign of life" in first
    assert "no longer holds the lock" in first


@pytest.mark.parametrize(
    ("status", "headline"), [(states.FAILED, "failed in score"), (states.INTERRUPTED, "interrupted in score")]
)
def test_a_run_that_stopped(run: RunDirectory, status: str, headline: str) -> None:
    state = StateFile(run.state_path)
    state.started("score", 0)
    state.ended(status, "sampler gate: 0.3\n  rule: …")
    text = describe(run.path)
    assert f"{headline} of iteration 0\n  sampler gate: 0.3\n" in text


def test_without_a_state(run: RunDirectory) -> None:
    run.config_path.write_text("name: x\n")
    run.state_path.write_text("{")
    assert "prepare done" in describe(run.path)


@pytest.mark.parametrize(
    ("name", "words"), [("nowhere", "there is no such directory"), (".", "holds no run")]
)
def test_no_run(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        describe(tmp_path / name)


def test_a_thousand_shards_take_no_time(run: RunDirectory) -> None:
    generated = run.iteration(0).generated
    generated.mkdir()
    for shard in range(1000):
        (generated / f"train-shard-{shard:05d}-of-01000.parquet").write_bytes(b"x")
    began = time.monotonic()
    describe(run.path)
    assert time.monotonic() - began < 0.5
