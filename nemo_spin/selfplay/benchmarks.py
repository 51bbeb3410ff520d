"""The benchmarks of a run's models as a table on the screen, and as lines for `status`."""

from __future__ import annotations

from rich import box
from rich.table import Table

from nemo_spin.report import published
from nemo_spin.report.benchmarks import BenchmarkTable, benchmark_table
from nemo_spin.selfplay.results import read_evaluation
from nemo_spin.selfplay.run_directory import RunDirectory


def run_benchmarks(run: RunDirectory) -> BenchmarkTable | None:
    """Those of theta_0 and of every iteration's model; None where there are none."""
    models = [("theta_0", read_evaluation(run.iteration(0).opponent_evaluation_path))]
    for iteration in run.existing_iterations():
        models.append((f"theta_{iteration + 1}", read_evaluation(run.iteration(iteration).evaluation_path)))
    return benchmark_table(models)


def screen_table(found: BenchmarkTable) -> Table:
    """In percent; the paper's models below a line."""
    table = Table(title="Benchmarks, percent", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("model")
    for column in found.columns:
        table.add_column(column, justify="right")
    for name, values in found.rows:
        last = bool(found.published) and name == found.rows[-1][0]
        table.add_row(name, *map(_shown, values), end_section=last)
    for name, values in found.published:
        table.add_row(name, *map(_shown, values))
    if found.published:
        table.caption = f"paper: {published.MODEL}, {published.WHERE}"
        table.caption_justify = "left"
    return table


def status_lines(found: BenchmarkTable) -> list[str]:
    """One line for each model, the paper's last."""
    return [
        f"{name:<16} "
        + "  ".join(f"{column} {_shown(value)}" for column, value in zip(found.columns, values, strict=True))
        for name, values in [*found.rows, *found.published]
    ]


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"
