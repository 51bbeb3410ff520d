"""Stand-ins for the ranks and the sampler, so that the loop itself can be tested in seconds.

The stand-ins write small files that depend on exactly what the stage was told it depends
on. `tests/functional` runs the same loop with Megatron and vLLM.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from nemo_spin.config.load import from_mapping
from nemo_spin.config.schema import Config
from nemo_spin.data.files import sha256_text, write_manifest
from nemo_spin.data.progress import Progress, ProgressFile
from nemo_spin.errors import NemoSpinError
from nemo_spin.selfplay import loop
from nemo_spin.selfplay.launcher import Job, RankJob
from nemo_spin.selfplay.run_directory import RunDirectory
from nemo_spin.selfplay.screen import Screen
from nemo_spin.selfplay.stages.evaluate import EvaluateStage
from nemo_spin.selfplay.stages.generate import GenerateStage
from nemo_spin.selfplay.stages.stage import Stage
from tests.functional.conftest import TinyData, tiny_data, tiny_model  # noqa: F401  (fixtures)

_ANSWERS = {"rows": 9, "mean_length": 3.0, "real_mean_length": 4.0, "cut_share": 0.25, "equal_share": 0.5}
COUNTS: dict[str, dict[str, Any]] = {
    "generate": {"train": _ANSWERS, "heldout": _ANSWERS},
    "evaluate": {"sampled": {"score": 0.5, **_ANSWERS}, "greedy": {"score": 0.75, **_ANSWERS}},
}


@dataclass
class StandInJob:
    """A job that has ended already."""

    code: int

    def poll(self) -> int | None:
        return self.code

    def interrupt(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def describe_failure(self) -> str:
        return "log: nowhere"


@dataclass
class StandIns:
    """Counts what was started; `fail_in` makes one stage fail.

    Attributes:
        started: Labels of the stages that were started, in order.
        fail_in: Label of the stage that raises `error` after it has left half a result.
        error: What it raises; a NemoSpinError is reported through the progress file.
    """

    started: list[str] = field(default_factory=list)
    fail_in: str | None = None
    error: BaseException | None = None

    def start(self, job: Job) -> RankJob:
        """The launcher's side: does a rank's work at once."""
        stage, *rest = job.arguments
        options = dict(zip(rest[::2], rest[1::2], strict=True))
        iteration = int(options["--iteration"]) if "--iteration" in options else None
        run = RunDirectory(Path(options["--run-dir"]))
        inputs = json.loads(Path(options["--inputs"]).read_text())
        progress = ProgressFile(job.progress_path)
        self.started.append(job.name)
        directory = {
            "score": run.at(iteration).scored,
            "train": run.at(iteration).train,
            "sft": run.at(iteration).train,
            "export": run.at(iteration).model,
            "import-hf": run.imported_dir,
        }[stage]
        try:
            self.work(job.name, directory, inputs, progress, model=run.at(iteration).opponent)
        except NemoSpinError as error:
            progress.error(error)
            return StandInJob(error.exit_code)
        return StandInJob(0)

    def work(
        self, label: str, directory: Path, inputs: dict[str, Any], progress: Progress, model: Path
    ) -> None:
        """Writes a result that depends on the inputs alone (and a model directory for exports)."""
        directory.mkdir(exist_ok=True)
        (directory / "half").write_text("half a result")
        if label == self.fail_in and self.error is not None:
            raise self.error
        stage = label.split()[0]
        text = sha256_text(json.dumps([stage, inputs], sort_keys=True))
        if stage == "export":
            shutil.copytree(
                model, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json")
            )
        (directory / "result").write_text(text)
        files = sorted(path.name for path in directory.iterdir() if path.name not in ("half", "inputs.json"))
        counts = COUNTS.get(stage, {"steps": 3, "loss": 0.5, "heldout_loss": 0.25})
        progress.update(1, 1, "step", loss=0.5)
        write_manifest(directory, stage=stage, files=files, inputs=inputs, counts=counts)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    """A launcher, and the sampler's two stages."""
    stand_ins = StandIns()

    def sample(stage: Stage, progress: Progress) -> None:
        stand_ins.started.append(stage.label)
        stand_ins.work(stage.label, stage.directory, stage.inputs(), progress, stage.context.theta_0)

    monkeypatch.setattr(GenerateStage, "run", sample)
    monkeypatch.setattr(EvaluateStage, "run", sample)
    for stage_class in (GenerateStage, EvaluateStage):
        monkeypatch.setattr(stage_class, "check", lambda stage: None)
    return stand_ins


@pytest.fixture
def make_config(tiny_model: Path, tiny_data: TinyData, tmp_path: Path) -> Callable[..., Config]:  # noqa: F811
    """A configuration of two iterations in `tmp_path/run`; sections are merged into it."""

    def make(**sections: Any) -> Config:
        values: dict[str, Any] = {
            "run_dir": str(tmp_path / "run"),
            "model": {"path": str(tiny_model)},
            "spin": {"iterations": 2, "beta": 0.1, "lr": [1e-4, 2e-4]},
            "sft": {"output": str(tmp_path / "sft")},
            "data": {"train": str(tiny_data.train), "heldout": str(tiny_data.heldout), "num_workers": 1},
        }
        for key, value in sections.items():
            if isinstance(value, dict):
                values[key] = {**values.get(key, {}), **value}
            else:
                values[key] = value
        return from_mapping(values)

    return make


@pytest.fixture
def run(stand_ins: StandIns) -> Callable[[Config], str]:
    """`loop.run` with the stand-ins; returns what was on screen."""

    def run_loop(config: Config) -> str:
        stand_ins.started.clear()
        stream = StringIO()
        loop.run(config, launcher=stand_ins, screen=Screen(stream))
        return stream.getvalue()

    return run_loop
