"""What keeps lm-eval from being started, and how it is ended; its results: `tests/functional/evaluate`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nemo_spin.config.load import from_mapping
from nemo_spin.config.schema import Config
from nemo_spin.errors import ConfigError, GenerationError
from nemo_spin.evaluate import benchmarks
from nemo_spin.generation.process import Interpreter
from tests.unit.config.test_validate import accepted, refused

TASKS = "evaluation.benchmarks.tasks"


def configured(**more: Any) -> Config:
    tasks = {"arc_challenge": {"num_fewshot": 25}}
    values = {
        "evaluation": {"benchmarks": {"tasks": tasks, **more}},
        "generation": {"python": sys.executable},
    }
    return from_mapping(values)


def test_an_interpreter_without_lm_eval_is_named_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match="has no lm-eval") as caught:
        benchmarks.check(configured())
    assert f"{sys.executable} -m pip install" in str(caught.value)
    benchmarks.check(Config())  # nobody asks for any


def test_a_directory_of_task_files_must_be_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(benchmarks, "_FIND", "")  # as if lm-eval were there
    with pytest.raises(ConfigError, match="there is no such directory"):
        benchmarks.check(configured(include_path=str(tmp_path / "nothing")))
    benchmarks.check(configured(include_path=str(tmp_path)))


def test_task_files_are_inputs(tmp_path: Path) -> None:
    config = configured(include_path=str(tmp_path))
    (tmp_path / "own.yaml").write_text("task: own")
    first = benchmarks.inputs(config)
    (tmp_path / "own.yaml").write_text("task: another")
    assert list(first["benchmark_files"]) == ["own.yaml"] and benchmarks.inputs(config) != first
    assert benchmarks.inputs(Config()) == benchmarks.inputs(configured()) == {}


def test_it_is_ended_when_it_takes_too_long(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(60)\n")
    job = benchmarks.BenchmarkJob(
        Interpreter(sys.executable, str(tmp_path)),
        request_path=tmp_path / "request.json",
        log_path=tmp_path / "log",
        timeout_s=0.5,
    )
    try:
        with pytest.raises(GenerationError, match=r"not done after 0\.5 s") as caught:
            while time.sleep(0.05) is None:
                assert job.poll() is None, "it sleeps"
        assert "evaluation.benchmarks.timeout_s" in str(caught.value) and "| loading" in str(caught.value)
    finally:
        job.stop()


def test_tasks_say_how_they_are_asked() -> None:
    accepted(f"{TASKS}={{arc: {{num_fewshot: 25, metric: acc}}, own: {{}}}}", "data.heldout=null")
    for wrong in ("25", "{num_fewshot: -1}", "{num_fewshot: 1.5}", "{metric: 3}", "{shots: 5}"):
        assert f"{TASKS}.arc" in refused(f"{TASKS}={{arc: {wrong}}}"), wrong
    assert "did you mean num_fewshot" in refused(f"{TASKS}={{arc: {{num_fewshots: 5}}}}")


def test_benchmarks_need_an_evaluation_and_an_engine() -> None:
    tasks = f"{TASKS}={{arc: {{}}}}"
    assert TASKS in refused(tasks, "evaluation.enabled=false")
    server = ("generation.engine=vllm_server", "generation.server=http://127.0.0.1:8000")
    assert TASKS in refused(tasks, *server)
