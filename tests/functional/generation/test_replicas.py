"""Several samplers share the shards of a stage, and any of them may die or be paused at any moment.

The engine is a stand-in that takes a fixed time (`stand_in.py`): what is looked at is who does
which shard. Processes, leases, signals and files are real. That real engines answer the same
side by side as one alone is shown at the end.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from nemo_spin.data.files import Manifest
from nemo_spin.errors import GenerationError
from nemo_spin.generation import replicas as replicas_module
from nemo_spin.generation.keeper import EngineKeeper
from nemo_spin.generation.replicas import ReplicasJob
from nemo_spin.generation.running import wait
from tests import prepared
from tests.functional.generation.harness import Stage, configuration
from tests.functional.generation.stand_in import order, write_package
from tests.functional.generation.test_failures import is_alive

Disturb = Callable[[ReplicasJob], None]


@dataclass
class Bench:
    """Runs a stage of many small shards, again and again."""

    root: Path
    model: Path
    data: Path

    def stage(self, name: str, **generation: object) -> Stage:
        settings: dict[str, object] = {
            "python": sys.executable,
            "num_generations": 2,
            "shard_rows": 2,
            "lease_timeout_s": 2.0,
            "keep_engine": "never",
        }
        config = configuration(**{**settings, **generation})
        return Stage(self.model, self.data, self.root / name, config=config)

    def run(self, name: str, disturb: Disturb | None = None, **generation: object) -> tuple[Manifest, float]:
        """Runs it to its end; returns what it left and the seconds it took."""
        stage = self.stage(name, **generation)
        began = time.monotonic()
        job = stage.start()
        assert isinstance(job, ReplicasJob)
        wait(job, poll_s=0.02, on_poll=None if disturb is None else lambda: disturb(job))
        seconds = time.monotonic() - began
        assert not any(map(is_alive, job.pids))
        manifest = stage.finish(job.notes)
        keys = [(row["id"], row["sample"]) for row in stage.table().select(["id", "sample"]).to_pylist()]
        assert len(keys) == len(set(keys)) == manifest.counts["train"]["rows"]
        assert {path.name for path in stage.out_dir.iterdir()} == {
            *manifest.files,
            "manifest.json",
            "request.json",
        }, "no leases, nothing half written"
        return manifest, seconds


@pytest.fixture
def bench(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    paths = [str(write_package(tmp_path / "packages")), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("ORDERS", str(tmp_path))
    monkeypatch.setattr(replicas_module, "_GRACE_S", 1.0)
    data = prepared.write(tmp_path / "data", train=prepared.rows(160, seed=1), row_group_size=64)
    order(tmp_path, seconds=0.1, seeded=True)
    return Bench(tmp_path, tiny_model, data)


def killer_by_shards(out_dir: Path, every: int, seed: int) -> Disturb:
    """Kills a sampler, any one, whenever so many more shards are done, however fast the machine is."""
    chance, due = random.Random(seed), [every]

    def kill(job: ReplicasJob) -> None:
        if len(list(out_dir.glob("*.parquet"))) >= due[0] and job.pids:
            due[0] += every
            os.kill(chance.choice(job.pids), signal.SIGKILL)

    return kill


def killer(every_s: float, seed: int) -> Disturb:
    """Kills a sampler, any one, every so often."""
    chance, due = random.Random(seed), [time.monotonic() + every_s]

    def kill(job: ReplicasJob) -> None:
        if time.monotonic() >= due[0] and job.pids:
            due[0] += every_s
            os.kill(chance.choice(job.pids), signal.SIGKILL)

    return kill


def test_samplers_that_are_killed_or_paused_lose_and_double_nothing(bench: Bench) -> None:
    undisturbed, _ = bench.run("undisturbed", replicas=3)
    assert undisturbed.counts["train"]["prompts"] == 160
    assert undisturbed.notes["engine"]["samplers"] == 3
    disturb = killer_by_shards(bench.stage("killed").out_dir, every=15, seed=1)
    killed, _ = bench.run("killed", disturb, replicas=3)
    assert killed.notes["engine"]["deaths"] >= 4
    assert killed.files == undisturbed.files, "the same bytes, whoever did a shard"
    paused: list[int] = []
    out_dir = bench.stage("paused").out_dir

    def pause(job: ReplicasJob) -> None:
        """One is paused at a shard until another has done it, and goes on then."""
        shards = len(list(out_dir.glob("*.parquet")))
        if not paused and shards >= 5:
            paused.append(job.pids[1])
            os.kill(paused[0], signal.SIGSTOP)
        elif shards == 80 and is_alive(paused[0]):
            os.kill(paused[0], signal.SIGCONT)

    went_on, _ = bench.run("paused", pause, replicas=2)
    assert paused
    assert went_on.notes["engine"]["deaths"] == 0
    assert went_on.files == undisturbed.files


def test_one_that_stays_paused_is_not_waited_for(bench: Bench) -> None:
    paused: list[int] = []
    out_dir = bench.stage("paused").out_dir

    def pause(job: ReplicasJob) -> None:
        if not paused and len(list(out_dir.glob("*.parquet"))) >= 5:
            paused.append(job.pids[0])
            os.kill(paused[0], signal.SIGSTOP)

    bench.run("paused", pause, replicas=2, shard_rows=8)
    assert paused
    assert not is_alive(paused[0])


def test_when_all_have_died_the_first_cause_and_its_log_are_named(bench: Bench) -> None:
    order(bench.root, generate="fail")
    stage = bench.stage("broken", replicas=2, replica_attempts=2, shard_rows=80)
    with pytest.raises(GenerationError) as caught:
        wait(stage.start(), poll_s=0.02)
    message = str(caught.value)
    assert "all 2 samplers: have died, 4 times in all" in message
    assert "generate is out of order" in message
    assert "generate.sampler-00" in message
    assert any("is given up" in note for note in stage.notes())
    order(bench.root, seeded=True)
    wait(stage.start(), poll_s=0.02)
    assert stage.finish().counts["train"]["prompts"] == 160


def test_each_sampler_is_kept_for_the_next_stage(bench: Bench) -> None:
    keeper = EngineKeeper()
    processes = []
    try:
        for name in ("one", "two"):
            stage = bench.stage(name, replicas=2, keep_engine="always", shard_rows=20)
            stage.keeper = keeper
            job = stage.start()
            assert isinstance(job, ReplicasJob)
            processes.append(job.pids)
            wait(job, poll_s=0.02)
            way = stage.finish(job.notes).notes["engine"]["way"]
            assert way == ("started" if name == "one" else "kept")
        assert processes[0] == processes[1]
        assert all(map(is_alive, processes[0]))
    finally:
        keeper.close()
    assert not any(map(is_alive, processes[0]))


@pytest.mark.slow
def test_a_thousand_shards_over_eight_samplers_with_a_kill_every_second(
    bench: Bench, record_testsuite_property: Callable[[str, object], None]
) -> None:
    rows = prepared.rows(4000, seed=3)
    bench.data = prepared.write(bench.root / "many", train=rows, row_group_size=512)
    order(bench.root, seconds=0.3, seeded=True)
    settings = {"replicas": 8, "shard_rows": 4, "lease_timeout_s": 10.0}
    undisturbed, without_s = bench.run("undisturbed", **settings)
    assert len(undisturbed.files) == 1000
    killed, with_s = bench.run("killed", killer(1.0, seed=7), **settings)
    assert killed.files == undisturbed.files
    deaths = killed.notes["engine"]["deaths"]
    for name, value in (("deaths", deaths), ("undisturbed_s", without_s), ("disturbed_s", with_s)):
        record_testsuite_property(name, value)  # in --junit-xml
    assert deaths >= 0.7 * with_s
    assert with_s <= 1.5 * without_s


@pytest.mark.vllm
def test_real_engines_side_by_side_answer_like_one(reference: Stage, tmp_path: Path) -> None:
    stage = Stage(
        reference.model_dir, reference.prepared, tmp_path, config=configuration(replicas=2, kv_cache_gib=0.01)
    )
    manifest = stage.run()
    assert manifest.files == reference.finish().files
