"""Rules about the benchmarks of `evaluation.benchmarks`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_spin.config.mistakes import Mistake, mistake, nearest
from nemo_spin.config.schema import Config

_TASKS = "evaluation.benchmarks.tasks"
BENCHMARK_KEYS = (_TASKS, "evaluation.enabled", "generation.engine")
_SETTINGS = ("num_fewshot", "metric")


def tasks_say_how_they_are_asked(config: Config) -> list[Mistake]:
    """Each task has a count of examples and the name of a metric, and nothing else."""
    return [
        mistake(
            f"{_TASKS}.{name}",
            found=found,
            rule="a mapping with num_fewshot (a whole number from 0), metric (a name), or both",
            remedy=f"such as {_TASKS}.{name}={{num_fewshot: 5, metric: acc}}",
        )
        for name, settings in config.evaluation.benchmarks.tasks.items()
        if (found := _unusable(settings)) is not None
    ]


def _unusable(settings: Any) -> str | None:
    if not isinstance(settings, Mapping):
        return repr(settings)
    for key, value in settings.items():
        if key not in _SETTINGS:
            guess = nearest(str(key), _SETTINGS)
            return f"there is no setting {key!r}" + (f"; did you mean {guess}?" if guess else "")
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if value is not None and not (is_count if key == "num_fewshot" else isinstance(value, str) and value):
            return f"{key} is {value!r}"
    return None


def benchmarks_have_an_engine(config: Config) -> list[Mistake]:
    """They are part of an evaluation, and load the model into a vLLM of their own."""
    if not config.evaluation.benchmarks.tasks:
        return []
    mistakes = []
    if not config.evaluation.enabled:
        mistakes.append(
            mistake(
                _TASKS,
                found=f"{len(config.evaluation.benchmarks.tasks)} tasks, with evaluation.enabled=false",
                rule="benchmarks are a part of the evaluation",
                remedy="set evaluation.enabled=true, or take the tasks away",
            )
        )
    if config.generation.engine != "vllm":
        mistakes.append(
            mistake(
                _TASKS,
                found=f"generation.engine={config.generation.engine}",
                rule="lm-eval starts a vLLM of its own, where generation.engine=vllm does",
                remedy="set generation.engine=vllm, or take the tasks away",
            )
        )
    return mistakes
