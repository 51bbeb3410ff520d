"""Benchmarks of all models of a run in one table, next to the paper's where they are comparable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_spin.report import published

AVERAGE = "average"


@dataclass(frozen=True)
class BenchmarkTable:
    """Shares from 0 to 1, a row for each model; None where a task was not measured.

    Attributes:
        columns: The tasks, then the average, where there are several.
        rows: Name of a model, and its values.
        published: The same of the paper's models; empty where they were asked otherwise.
    """

    columns: list[str]
    rows: list[tuple[str, list[float | None]]]
    published: list[tuple[str, list[float | None]]]


def benchmark_table(models: Sequence[tuple[str, Mapping[str, Any]]]) -> BenchmarkTable | None:
    """The table of some models; None where none has a result.

    Args:
        models: Name and evaluation (`evaluation.json`) of each.
    """
    results = [(name, _tasks(evaluation)) for name, evaluation in models]
    tasks = list(dict.fromkeys(task for _, found in results for task in found))
    if not tasks:
        return None
    rows = [(name, _row([_value(found.get(task)) for task in tasks])) for name, found in results if found]
    theirs = published_rows(tasks) if all(_is_the_papers(found) for _, found in results) else []
    return BenchmarkTable([*tasks, AVERAGE] if len(tasks) > 1 else tasks, rows, theirs)


def published_rows(tasks: Sequence[str]) -> list[tuple[str, list[float | None]]]:
    """The paper's models at the tasks that it has, all of `tasks`."""
    places = [list(published.TASKS).index(task) for task in tasks]
    return [
        (f"paper's theta_{number}", _row([scores[place] / 100 for place in places]))
        for number, scores in enumerate(published.SCORES)
    ]


def _tasks(evaluation: Mapping[str, Any]) -> Mapping[str, Any]:
    benchmarks = evaluation.get("benchmarks")
    return benchmarks if isinstance(benchmarks, Mapping) else {}


def _value(result: Any) -> float | None:
    value = result.get("value") if isinstance(result, Mapping) else None
    return float(value) if isinstance(value, (int, float)) else None


def _row(values: list[float | None]) -> list[float | None]:
    if len(values) == 1:
        return values
    known = [value for value in values if value is not None]
    return [*values, sum(known) / len(known) if len(known) == len(values) else None]


def _is_the_papers(results: Mapping[str, Any]) -> bool:
    """Whether every task was asked as the paper asked it: all questions, examples and metric."""
    return all(
        name in published.TASKS
        and (result.get("num_fewshot"), result.get("asked_metric")) == published.TASKS[name]
        and result.get("limit") is None
        for name, result in results.items()
    )
