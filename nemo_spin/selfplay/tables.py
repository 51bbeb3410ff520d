"""The table after an iteration, and the one over all of them at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from nemo_spin.selfplay.displays import duration
from nemo_spin.selfplay.results import IterationResults, iteration_results, number, read_evaluation
from nemo_spin.selfplay.run_directory import RunDirectory
from nemo_spin.selfplay.screen import Screen

_TRAINING_ROWS = (
    ("loss", "loss"),
    ("margin", "margin"),
    ("accuracy", "accuracy"),
    ("real log-prob", "policy_real_logps"),
    ("generated log-prob", "policy_generated_logps"),
)
_ANSWERS = (("answer length (tokens)", "mean_length"), ("cut by the limit", "cut_share"))


def show_iteration(screen: Screen, run: RunDirectory, iteration: int) -> None:
    """One iteration: what was trained, how it answers, where the time went."""
    results = iteration_results(run, iteration)
    table = Table(title=f"Iteration {iteration}", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for name in ("training pairs", "held-out pairs"):
        table.add_column(name, justify="right")
    for label, key in _TRAINING_ROWS:
        _add_row(table, label, number(results.training, key), number(results.training, f"heldout_{key}"))
    for label, key in _ANSWERS:
        values = [number(results.generated, split, key) for split in ("train", "heldout")]
        _add_row(table, f"opponent's {label}", *values)
    for way in ("sampled", "greedy"):
        _add_row(table, f"score, {way}", None, number(results.evaluation, way, "score"))
    screen.show(table)
    if results.seconds:
        times = "  ".join(f"{stage} {duration(seconds)}" for stage, seconds in results.seconds.items())
        screen.show(f"  {times}\n")


def _add_row(table: Table, label: str, *values: float | None) -> None:
    if any(value is not None for value in values):
        table.add_row(label, *(shown(value) for value in values))


def show_run(screen: Screen, run: RunDirectory) -> None:
    """All models of the run, one row each, theta_0 first."""
    rows: list[tuple[str, IterationResults]] = []
    first = read_evaluation(run.iteration(0).opponent_evaluation_path)
    rows.append(("theta_0", IterationResults(evaluation=first)))
    for iteration in run.existing_iterations():
        rows.append((f"theta_{iteration + 1}", iteration_results(run, iteration)))
    columns = [(title, [read(results) for _, results in rows]) for title, read in _COLUMNS.items()]
    columns = [(title, values) for title, values in columns if any(value is not None for value in values)]
    table = Table(title="All iterations", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("model")
    for title, _ in columns:
        table.add_column(title, justify="right")
    for index, (name, _) in enumerate(rows):
        cells = [
            duration(value) if title == "time" and value is not None else shown(value)
            for title, value in ((title, values[index]) for title, values in columns)
        ]
        table.add_row(name, *cells)
    screen.show(table)
    last = _last_model(run)
    if last is not None:
        screen.show(f"  the last model: {last}")


def _of(section: str, *path: str) -> Callable[[IterationResults], float | None]:
    def read(results: IterationResults) -> float | None:
        values: dict[str, Any] = getattr(results, section)
        return number(values, *path)

    return read


def _time(results: IterationResults) -> float | None:
    return sum(results.seconds.values()) if results.seconds else None


_COLUMNS: dict[str, Callable[[IterationResults], float | None]] = {
    "score sampled": _of("evaluation", "sampled", "score"),
    "score greedy": _of("evaluation", "greedy", "score"),
    "length": _of("evaluation", "sampled", "mean_length"),
    "cut": _of("evaluation", "sampled", "cut_share"),
    "loss": _of("training", "heldout_loss"),
    "margin": _of("training", "heldout_margin"),
    "accuracy": _of("training", "heldout_accuracy"),
    "real log-prob": _of("training", "heldout_policy_real_logps"),
    "generated log-prob": _of("training", "heldout_policy_generated_logps"),
    "time": _time,
}


def _last_model(run: RunDirectory) -> Path | None:
    models = [run.iteration(iteration).model for iteration in run.existing_iterations()]
    return next((model for model in reversed(models) if model.exists()), None)


def shown(value: float | None) -> str:
    """A number in at most four digits; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:,.0f}"
