"""What becomes of an engine between stages, and when something goes wrong with it.

With a stand-in for vLLM (`stand_in.py`); that the real one takes new weights is shown by
`test_refresh.py`.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from nemo_spin.errors import GateError, GenerationError
from nemo_spin.generation.canary import Canary, CanaryText, write_canary
from nemo_spin.generation.job import SamplerJob
from nemo_spin.generation.keeper import EngineKeeper
from nemo_spin.generation.running import wait
from tests.functional.generation.harness import Stage, configuration
from tests.functional.generation.stand_in import order, write_package
from tests.functional.generation.test_failures import is_alive


@dataclass
class Run:
    """Stages of one run, each in a directory of its own."""

    root: Path
    model: Path
    prepared: Path
    keeper: EngineKeeper
    count: int = 0

    def stage(self, weights: int, *, canary: int | None = None, **generation: Any) -> Stage:
        """A stage with the model whose last byte is `weights`, checked against that of `canary`."""
        model = self.root / f"model-{weights}"
        if not model.exists():
            shutil.copytree(self.model, model)
            content = bytearray((model / "model.safetensors").read_bytes())
            content[-1] = weights
            (model / "model.safetensors").write_bytes(content)
        canary_path = None
        if canary is not None:
            canary_path = self.root / f"canary-{canary}.json"
            text = CanaryText([5, 6, 7], [8, 9], 2 * (-1.0 - canary / 256))
            write_canary(canary_path, Canary("32", (text,)))
        self.count += 1
        return Stage(
            model,
            self.prepared,
            self.root / f"stage-{self.count}",
            config=configuration(python=sys.executable, num_generations=1, **generation),
            opponent_sha256=f"{weights:064x}",
            canary_path=canary_path,
            keeper=self.keeper,
        )

    def way(self, stage: Stage) -> tuple[str, int]:
        """Runs it; returns how it came to its engine, and the engine's process."""
        job = stage.start()
        assert isinstance(job, SamplerJob)
        wait(job, poll_s=0.02)
        manifest = stage.finish(job.notes)
        expected = -1.0 - int(stage.opponent_sha256, 16) / 256
        assert set(stage.table()["sampler_logps"].to_pylist()) == {expected}, "other weights answered"
        return manifest.notes["engine"]["way"], job.pid


@pytest.fixture
def run(
    tiny_model: Path, prepared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Run]:
    paths = [str(write_package(tmp_path / "packages")), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("ORDERS", str(tmp_path))
    order(tmp_path)
    keeper = EngineKeeper()
    yield Run(tmp_path, tiny_model, prepared_dir, keeper)
    keeper.close()


def test_one_process_serves_stage_after_stage(run: Run) -> None:
    way, process = run.way(run.stage(16))
    assert way == "started"
    assert run.way(run.stage(16)) == ("kept", process)
    assert run.way(run.stage(32, canary=32)) == ("refreshed", process)
    run.keeper.make_room()  # a CPU has room for both
    assert run.way(run.stage(16, canary=16, shard_rows=40)) == ("refreshed", process)
    run.keeper.close()
    assert not is_alive(process)


def test_an_engine_that_cannot_serve_a_stage_is_ended(run: Run) -> None:
    _, process = run.way(run.stage(16))
    way, other = run.way(run.stage(16, max_num_seqs=5))
    assert (way, is_alive(process)) == ("started", False)
    run.keeper.make_room()
    assert is_alive(other)
    way, third = run.way(run.stage(16, max_num_seqs=5, keep_engine="never"))
    assert (way, third) == ("kept", other)
    assert not is_alive(third), "it is not kept once more"


def test_an_engine_that_ended_while_it_waited_is_replaced(run: Run) -> None:
    _, process = run.way(run.stage(16))
    os.kill(process, 9)
    way, other = run.way(run.stage(32))
    assert (way, other != process) == ("started", True)


@pytest.mark.parametrize(
    ("misbehaviour", "words"),
    [
        ({"reload": "fail"}, "reload is out of order"),
        ({"reload": "die"}, "exit code 9"),
        pytest.param({"reload": "hang"}, "not done after 8 s", marks=pytest.mark.slow),
        ({"generate": "fail"}, "generate is out of order"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_kept_engine_that_fails_is_replaced_loudly(
    run: Run, misbehaviour: dict[str, str], words: str
) -> None:
    _, process = run.way(run.stage(16))
    order(run.root, **misbehaviour)
    stage = run.stage(32, canary=32, load_timeout_s=8.0 if "hang" in misbehaviour.values() else 300.0)
    job = stage.start()
    assert isinstance(job, SamplerJob)
    assert job.pid == process

    def obedient_from_now_on() -> None:
        if stage.notes():
            order(run.root)

    wait(job, poll_s=0.02, on_poll=obedient_from_now_on)
    engine = stage.finish(job.notes).notes["engine"]
    assert engine["way"] == "started"
    assert not is_alive(process)
    (said,) = stage.notes()
    assert "the engine of the stage before is given up" in said
    assert words in f"{said} {engine['given_up']}" + stage.log_path.read_text()


@pytest.mark.parametrize("misbehaviour", [{"reload": "nothing"}, {}], ids=["stale", "wrong"])
def test_a_canary_gives_a_kept_engine_away(run: Run, misbehaviour: dict[str, str]) -> None:
    """One that did not exchange anything, and one whose new weights are not those they should be."""
    run.way(run.stage(16))
    order(run.root, **misbehaviour)
    stage = run.stage(32, canary=32 if misbehaviour else 48)
    if misbehaviour:
        assert run.way(stage)[0] == "started"
        assert "nats per token" in stage.notes()[0]
        return
    with pytest.raises(GateError, match=r"nats per token"):
        run.way(stage)
    assert len(stage.notes()) == 1, "a new engine was tried, once"
    assert not list(stage.out_dir.glob("*.parquet"))


def test_weights_that_were_not_exchanged_show_however_small_the_step(run: Run) -> None:
    run.way(run.stage(16))
    order(run.root, reload="nothing")
    stage = run.stage(17, canary=17)
    stage.config.spin.gates.sampler_tolerance = 1.0
    assert run.way(stage)[0] == "started"
    assert "exactly what it said about the weights before" in stage.notes()[0]


def test_a_new_engine_that_fails_stops_the_stage(run: Run) -> None:
    order(run.root, generate="fail")
    stage = run.stage(16)
    with pytest.raises(GenerationError, match="generate is out of order"):
        run.way(stage)
    assert not stage.notes(), "there was no engine to give up"


def test_the_comparison_can_be_turned_off(run: Run) -> None:
    stage = run.stage(16, canary=99)
    stage.config.spin.gates.sampler = False
    assert run.way(stage)[0] == "started"
    assert run.way(replace(stage, directory=run.root / "again"))[0] == "kept"
