"""Benchmarks of lm-eval (lm-evaluation-harness), through vLLM, in a process of their own.

That process runs under `generation.python`, where lm-eval has to be installed too, and loads
the model into an engine of its own. Each finished task is a file, so that a killed evaluation
goes on with the next task; `results` gathers them.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nemo_spin.config.schema import Config
from nemo_spin.data.files import sha256_file, write_json
from nemo_spin.errors import ConfigError, GenerationError, explain
from nemo_spin.generation.environment import python_path, sampler_python
from nemo_spin.generation.job import NothingToDo
from nemo_spin.generation.placement import HERE, Place, Placement
from nemo_spin.generation.process import Interpreter, SamplerProcess
from nemo_spin.generation.settings import engine_settings, max_context

DIRECTORY = "benchmarks"
_WORKER = "nemo_spin.evaluate.benchmark_worker"
_TASKS = "evaluation.benchmarks.tasks"
_FIND = "from importlib.metadata import version; print(version('lm_eval'))"
_FIND_TIMEOUT_S = 120.0
_LOG_BYTES = 8 << 10
_LOG_LINES = 12


def check(config: Config) -> None:
    """Looks whether the configured benchmarks can be started; harmless where there are none.

    Raises:
        ConfigError: lm-eval is missing, or the directory of task files.
    """
    benchmarks = config.evaluation.benchmarks
    if not benchmarks.tasks:
        return
    python = sampler_python(config)
    if _has_lm_eval(config, python) is False:
        raise ConfigError(
            explain(
                _TASKS,
                found=f"{python} has no lm-eval",
                rule="benchmarks are run by lm-eval, in the environment that has vLLM",
                remedy=f"{python} -m pip install 'lm-eval>=0.4.13', or take the tasks away",
            )
        )
    if benchmarks.include_path is not None and not Path(benchmarks.include_path).is_dir():
        raise ConfigError(
            explain(
                f"evaluation.benchmarks.include_path={benchmarks.include_path}",
                found="there is no such directory",
                rule="a directory with task files of lm-eval",
                remedy="check the path; relative ones start at the current directory",
            )
        )


def _has_lm_eval(config: Config, python: str) -> bool | None:
    """Whether an interpreter finds lm-eval; None in a container, which cannot be seen."""
    if config.launcher.name == "slurm" and config.launcher.slurm.container_image is not None:
        return None
    found = subprocess.run(
        [python, "-P", "-c", _FIND], capture_output=True, timeout=_FIND_TIMEOUT_S, check=False
    )
    return found.returncode == 0


def inputs(config: Config) -> dict[str, Any]:
    """What results depend on besides the configuration: the user's own task files."""
    path = config.evaluation.benchmarks.include_path
    if not config.evaluation.benchmarks.tasks or path is None:
        return {}
    files = sorted(file for file in Path(path).rglob("*") if file.is_file() and file.suffix != ".pyc")
    return {"benchmark_files": {str(file.relative_to(path)): sha256_file(file) for file in files}}


class BenchmarkJob:
    """lm-eval at work on a model; a `RunningJob` of the loop whose `poll` raises typed errors.

    Args:
        interpreter: What it runs under.
        request_path: What it is asked to do.
        log_path: Its output.
        timeout_s: Seconds for all of it.
        placement: Where it runs.
    """

    def __init__(
        self,
        interpreter: Interpreter,
        *,
        request_path: Path,
        log_path: Path,
        timeout_s: float,
        placement: Placement = HERE,
    ) -> None:
        self._log_path, self._timeout_s = log_path, timeout_s
        self._process = SamplerProcess(
            interpreter, request_path=request_path, log_path=log_path, placement=placement, module=_WORKER
        )

    @property
    def pid(self) -> int:
        """Of the process, and of its group."""
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit code, None while it runs. It does not wait.

        Raises:
            GenerationError: It took too long, and was ended.
        """
        code = self._process.poll()
        if code is None and time.monotonic() - self._process.began > self._timeout_s:
            self._process.kill()
            raise GenerationError(
                explain(
                    "evaluation.benchmarks",
                    found=f"not done after {self._timeout_s:g} s, and ended\n{self.describe_failure()}",
                    rule="they take evaluation.benchmarks.timeout_s at most",
                    remedy="raise evaluation.benchmarks.timeout_s if they only need longer; "
                    "the same command goes on with the task that was not done",
                )
            )
        return code

    def stop(self) -> None:
        """Ends the whole process group, within seconds."""
        self._process.stop()

    def describe_failure(self) -> str:
        """The last lines of its log, and the log's path."""
        try:
            text = self._log_path.read_bytes()[-_LOG_BYTES:].decode("utf-8", errors="replace")
        except OSError:
            text = ""
        shown = [f"  | {line[:300]}" for line in text.splitlines() if line.strip()][-_LOG_LINES:]
        return "\n".join([*shown, f"  log:    {self._log_path}"])


def start(
    config: Config,
    *,
    model_dir: Path,
    model_sha256: str,
    out_dir: Path,
    progress_path: Path,
    log_path: Path,
    place: Place | None = None,
) -> BenchmarkJob | NothingToDo:
    """Starts the tasks that have no result yet.

    Args:
        config: The configuration.
        model_dir: Hugging Face directory of the model.
        model_sha256: Hash of it.
        out_dir: The evaluation's directory; results lie in `benchmarks` below it.
        progress_path: Where the process reports how far it is.
        log_path: Where its output goes.
        place: Where samplers run, of which this takes the first one's place; None: here.

    Raises:
        NemoSpinError: The model cannot be loaded as configured.
    """
    missing = [name for name in config.evaluation.benchmarks.tasks if not _path(out_dir, name).exists()]
    if not missing:
        return NothingToDo()
    python = sampler_python(config)
    request_path = out_dir / DIRECTORY / "request.json"
    request_path.parent.mkdir(parents=True, exist_ok=True)
    write_json(request_path, _request(config, model_dir, model_sha256, out_dir, progress_path))
    return BenchmarkJob(
        Interpreter(python, python_path(python, log_path.parent)),
        request_path=request_path,
        log_path=log_path,
        timeout_s=config.evaluation.benchmarks.timeout_s,
        placement=HERE if place is None else place(0),
    )


def results(config: Config, out_dir: Path) -> dict[str, Any]:
    """Task -> its result, of all configured tasks, which must be done."""
    return {
        name: json.loads(_path(out_dir, name).read_text(encoding="utf-8"))
        for name in config.evaluation.benchmarks.tasks
    }


def files(config: Config) -> list[str]:
    """The files of the results, relative to the evaluation's directory."""
    return [f"{DIRECTORY}/{_file(name)}" for name in config.evaluation.benchmarks.tasks]


def _request(
    config: Config, model_dir: Path, model_sha256: str, out_dir: Path, progress_path: Path
) -> Mapping[str, Any]:
    from nemo_spin.bridge.families import architecture_of

    benchmarks = config.evaluation.benchmarks
    architecture = architecture_of(model_dir)
    longest = max_context(architecture)
    engine = replace(
        engine_settings(config, model_dir, None, architecture=architecture, passes=[]),
        max_model_len=min(benchmarks.max_length or longest, longest),
        model_sha256=model_sha256,
        max_adapter_rank=0,
        adapter_modules=(),
    )
    include = benchmarks.include_path
    return {
        "engine": asdict(engine),
        "tasks": [
            {"name": name, "file": _file(name), "num_fewshot": None, "metric": None, **settings}
            for name, settings in benchmarks.tasks.items()
        ],
        "include_path": None if include is None else str(Path(include).absolute()),
        "limit": benchmarks.limit,
        "seed": config.seed,
        "out_dir": str((out_dir / DIRECTORY).absolute()),
        "progress_path": str(progress_path.absolute()),
    }


def _path(out_dir: Path, name: str) -> Path:
    return out_dir / DIRECTORY / _file(name)


def _file(name: str) -> str:
    """A task's name may hold what a file's name cannot."""
    return f"{name.replace('/', '_')}.json"
