"""The table of benchmarks, and when the paper's numbers stand beside it."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_spin.config.load import load_config
from nemo_spin.report import published
from nemo_spin.report.benchmarks import benchmark_table


def asked_as_the_paper(value: float) -> dict[str, Any]:
    return {
        task: {"value": value, "num_fewshot": shots, "asked_metric": metric, "limit": None}
        for task, (shots, metric) in published.TASKS.items()
    }


def test_all_models_and_their_averages_beside_the_papers() -> None:
    halves, none = {"benchmarks": asked_as_the_paper(0.5)}, {"sampled": {"score": 0.3}}
    table = benchmark_table([("theta_0", halves), ("theta_1", none)])
    assert table is not None
    assert table.columns == [*published.TASKS, "average"]
    assert table.rows == [("theta_0", [0.5] * 7)]
    # the averages that the paper prints itself, of the six columns it prints
    averages = [100 * values[-1] for _, values in table.published if values[-1] is not None]
    assert averages == pytest.approx([58.14, 60.80, 62.12, 62.97, 63.16], abs=0.0051)


@pytest.mark.parametrize("change", [{"num_fewshot": 3}, {"limit": 10}, {"asked_metric": "acc_norm"}])
def test_what_was_asked_otherwise_is_not_compared(change: dict[str, Any]) -> None:
    results = asked_as_the_paper(0.5)
    results["mmlu"] |= change
    table = benchmark_table([("theta_0", {"benchmarks": results})])
    assert table is not None and table.published == []


def test_some_of_the_papers_tasks_are_enough() -> None:
    results = {"gsm8k": asked_as_the_paper(0.25)["gsm8k"]}
    table = benchmark_table([("theta_0", {"benchmarks": results})])
    assert table is not None and table.columns == ["gsm8k"] and table.rows == [("theta_0", [0.25])]
    assert next(values for _, values in table.published) == [pytest.approx(0.2676)]


def test_no_benchmarks_no_table() -> None:
    assert benchmark_table([("theta_0", {}), ("theta_1", {"greedy": {}})]) is None


def test_the_shipped_configuration_asks_as_the_paper_did() -> None:
    config = load_config(
        None, ["evaluation=open_llm_leaderboard", "run_dir=r", "model.path=m", "data.train=d"], command="run"
    )
    asked = {
        name: (settings["num_fewshot"], settings["metric"])
        for name, settings in config.evaluation.benchmarks.tasks.items()
    }
    assert asked == published.TASKS
