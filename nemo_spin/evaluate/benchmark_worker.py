"""The process of lm-eval: `python -m nemo_spin.evaluate.benchmark_worker REQUEST.json`.

Runs under the interpreter that has vLLM and lm-eval, which may have little else: it imports
neither the configuration nor Megatron or NeMo. One engine serves all tasks; the result of
each is written as soon as it is there, and a task that has one is left out.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_spin.data.files import write_json
from nemo_spin.data.progress import Progress, ProgressFile
from nemo_spin.errors import ConfigError, NemoSpinError, explain
from nemo_spin.generation.lifeline import die_with_parent
from nemo_spin.generation.request import engine_from_dict
from nemo_spin.generation.vllm_offline import llm_arguments, name_package, prepare_environment

_TASKS = "evaluation.benchmarks.tasks"


def run(request: Mapping[str, Any], progress: Progress) -> None:
    """Does what a request asks.

    Raises:
        ConfigError: lm-eval knows no such task, or the task no such metric.
    """
    out_dir, tasks = Path(request["out_dir"]), request["tasks"]
    missing = [task for task in tasks if not (out_dir / task["file"]).exists()]
    done = len(tasks) - len(missing)
    progress.update(done, len(tasks), "benchmarks")
    settings = engine_from_dict(request["engine"])
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.setdefault(name, "0")  # unlike a sampler, tasks may fetch their data
    prepare_environment(settings)
    arguments = llm_arguments(settings)
    name_package()
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ConfigError(
            explain(
                _TASKS,
                found=f"{sys.executable} has no {error.name}",
                rule="benchmarks are run by lm-eval, in the environment that has vLLM",
                remedy=f"{sys.executable} -m pip install lm-eval",
            )
        ) from error

    manager = TaskManager(include_path=request["include_path"])
    _check_names([task["name"] for task in missing], manager.all_tasks)
    model = _model(arguments, seed=request["seed"])
    for task in missing:
        found = _asked(model, manager, task, limit=request["limit"])
        write_json(out_dir / task["file"], _result(task, found, limit=request["limit"]))
        done += 1
        progress.update(done, len(tasks), "benchmarks")


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    import difflib

    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            raise ConfigError(
                explain(
                    _TASKS,
                    found=f"lm-eval knows no task {name!r}",
                    rule="the name of a task or group of lm-eval, or of a file in include_path",
                    remedy=f"did you mean {' or '.join(near)}?" if near else "see `lm-eval ls tasks`",
                )
            )


def _model(arguments: Mapping[str, Any], *, seed: int) -> Any:
    """lm-eval's own vLLM model, with an engine that is set up as the sampler's."""
    from lm_eval.models.vllm_causallms import VLLM

    rest = {name: value for name, value in arguments.items() if name not in ("model", "seed")}
    return VLLM(pretrained=arguments["model"], seed=seed, batch_size="auto", **rest)


def _asked(model: Any, manager: Any, task: Mapping[str, Any], *, limit: int | None) -> Mapping[str, Any]:
    """What lm-eval says of one task or group: `results`, `n-samples` and more, by its name."""
    import lm_eval

    found: Mapping[str, Any] = lm_eval.simple_evaluate(
        model=model,
        tasks=[task["name"]],
        num_fewshot=task["num_fewshot"],
        limit=limit,
        task_manager=manager,
        log_samples=False,
    )
    return found


def _result(task: Mapping[str, Any], found: Mapping[str, Any], *, limit: int | None) -> dict[str, Any]:
    """One number of a task, and how it came about.

    Raises:
        ConfigError: The task has no such metric.
    """
    name, numbers = task["name"], found["results"][task["name"]]
    metrics = [
        key
        for key, value in numbers.items()
        if "," in key and "_stderr," not in key and isinstance(value, (int, float))
    ]
    wanted = task["metric"]
    chosen = [key for key in metrics if wanted is None or key == wanted or key.split(",")[0] == wanted]
    if not chosen:
        raise ConfigError(
            explain(
                f"{_TASKS}.{name}.metric={wanted}",
                found="the task has no such metric",
                rule=f"one of {', '.join(metrics)}",
                remedy="name one of them, or leave it out for the first",
            )
        )
    metric, _, filtered = chosen[0].partition(",")
    error = numbers.get(f"{metric}_stderr,{filtered}")
    counts = found.get("n-samples", {})
    shots = {found.get("n-shot", {}).get(subtask) for subtask in counts}
    return {
        "value": float(numbers[chosen[0]]),
        "stderr": float(error) if isinstance(error, (int, float)) else None,
        "metric": chosen[0],
        "asked_metric": wanted,
        "num_fewshot": shots.pop() if len(shots) == 1 else task["num_fewshot"],
        "questions": sum(int(count["effective"]) for count in counts.values()),
        "limit": limit,
        "lm_eval": importlib.metadata.version("lm_eval"),
    }


def main(arguments: list[str]) -> int:
    """Does what the request in a file asks; returns the exit code."""
    die_with_parent()
    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    progress = ProgressFile(Path(request["progress_path"]))
    try:
        run(request, progress)
    except NemoSpinError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        progress.error(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
