"""The table after an iteration, and the one over all of them at the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from nemo_spin.selfplay.benchmarks import run_benchmarks, screen_table
from nemo_spin.selfplay.displays import duration
from nemo_spin.selfplay.guards import heldout_real_logps
from nemo_spin.selfplay.results import IterationResults, iteration_results, number, read_evaluation
from nemo_spin.selfplay.run_directory import RunDirectory
from nemo_spin.selfplay.screen import Screen

_REAL_PER_TOKEN = "heldout_policy_real_logps_per_token"
_LARGEST_EXPONENT = 700.0  # beyond it a float overflows
_TRAINING_ROWS = (
    ("loss", "loss"),
    ("margin", "margin"),
    ("accuracy", "accuracy"),
    ("real log-prob", "policy_real_logps"),
    ("generated log-prob", "policy_generated_logps"),
)


def show_iteration(screen: Screen, run: RunDirectory, iteration: int) -> None:
    """One iteration: what was trained, how it answers, where the time went."""
    results = iteration_results(run, iteration)
    table = Table(title=f"Iteration {iteration}", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for name in ("training pairs", "held-out pairs"):
        table.add_column(name, justify="right")
    for label, key in _TRAINING_ROWS:
        _add_row(table, label, number(results.training, key), number(results.training, f"heldout_{key}"))
    lengths = [number(results.generated, split, "mean_length") for split in ("train", "heldout")]
    _add_row(table, "answer length of the opponent", *lengths)
    cut = [number(results.generated, split, "cut_share") for split in ("train", "heldout")]
    _add_row(table, "answers cut by the limit", *cut, show=percent)
    for way in ("sampled", "greedy"):
        _add_row(table, f"score, {way}", None, number(results.evaluation, way, "score"))
    screen.show(table)
    if results.seconds:
        times = "  ".join(f"{stage} {duration(seconds)}" for stage, seconds in results.seconds.items())
        screen.show(f"  {times}\n")
    speed = _speed(results)
    if speed:
        screen.show(f"  {speed}\n")


def _speed(results: IterationResults) -> str:
    """How fast an iteration was, in a line; empty where nothing is known."""
    training = results.training
    known = (
        ("score {:,.0f} tokens/s", number(results.scored, "tokens_per_second")),
        ("train {:,.0f} tokens/s", number(training, "tokens_per_second")),
        ("{:.1%} of the peak", number(training, "peak_share")),
        ("both {:,.1f} pairs/s", number(training, "pairs_per_second_with_scoring")),
        ("memory {:.1f} GiB", number(training, "peak_memory_gib")),
    )
    return "  ".join(text.format(value) for text, value in known if value is not None)


def shown(value: float | None) -> str:
    """A number in about four digits; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A share as a percentage."""
    return "–" if value is None else f"{value:.1%}"


def _time(value: float | None) -> str:
    return "–" if value is None else duration(value)


def _add_row(
    table: Table, label: str, *values: float | None, show: Callable[[float | None], str] = shown
) -> None:
    if any(value is not None for value in values):
        table.add_row(label, *(show(value) for value in values))


def show_run(screen: Screen, run: RunDirectory) -> None:
    """All models of the run, one row each, theta_0 first."""
    rows: list[tuple[str, IterationResults]] = []
    first = read_evaluation(run.iteration(0).opponent_evaluation_path)
    before = heldout_real_logps(iteration_results(run, 0).training, "opponent")
    measured = {} if before is None else {_REAL_PER_TOKEN: before}
    rows.append(("theta_0", IterationResults(training=measured, evaluation=first)))
    for iteration in run.existing_iterations():
        rows.append((f"theta_{iteration + 1}", iteration_results(run, iteration)))
    columns = {
        title: [column.show(column.read(results)) for _, results in rows]
        for title, column in _COLUMNS.items()
        if any(column.read(results) is not None for _, results in rows)
    }
    table = Table(title="All iterations", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("model")
    for title in columns:
        table.add_column(title, justify="right")
    for index, (name, _) in enumerate(rows):
        table.add_row(name, *(cells[index] for cells in columns.values()))
    screen.show(table)
    benchmarks = run_benchmarks(run)
    if benchmarks is not None:
        screen.show(screen_table(benchmarks))
    last = _last_model(run)
    if last is not None:
        screen.show(f"  the last model: {last}")


@dataclass(frozen=True)
class _Column:
    read: Callable[[IterationResults], float | None]
    show: Callable[[float | None], str] = shown


def _of(section: str, *path: str) -> Callable[[IterationResults], float | None]:
    def read(results: IterationResults) -> float | None:
        values: dict[str, Any] = getattr(results, section)
        return number(values, *path)

    return read


def _perplexity(results: IterationResults) -> float | None:
    """Of the held-out demonstrations: e to the mean negative log-probability per token."""
    per_token = number(results.training, _REAL_PER_TOKEN)
    return None if per_token is None else math.exp(min(-per_token, _LARGEST_EXPONENT))


def _seconds(results: IterationResults) -> float | None:
    return sum(results.seconds.values()) if results.seconds else None


_COLUMNS = {
    "score sampled": _Column(_of("evaluation", "sampled", "score")),
    "score greedy": _Column(_of("evaluation", "greedy", "score")),
    "length": _Column(_of("evaluation", "sampled", "mean_length")),
    "cut": _Column(_of("evaluation", "sampled", "cut_share"), percent),
    "perplexity": _Column(_perplexity),
    "loss": _Column(_of("training", "heldout_loss")),
    "margin": _Column(_of("training", "heldout_margin")),
    "accuracy": _Column(_of("training", "heldout_accuracy")),
    "real log-prob": _Column(_of("training", "heldout_policy_real_logps")),
    "generated log-prob": _Column(_of("training", "heldout_policy_generated_logps")),
    "pairs/s": _Column(_of("training", "pairs_per_second_with_scoring")),
    "time": _Column(_seconds, _time),
}


def _last_model(run: RunDirectory) -> Path | None:
    models = [run.iteration(iteration).model for iteration in run.existing_iterations()]
    return next((model for model in reversed(models) if model.exists()), None)
