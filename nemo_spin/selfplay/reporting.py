"""What a report is told about a run: which files there are, and how long everything took."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from nemo_spin.errors import ConfigError, explain
from nemo_spin.report.sources import PartSource, RunSource, StageTime
from nemo_spin.selfplay.results import STAGES
from nemo_spin.selfplay.run_directory import RunDirectory
from nemo_spin.selfplay.state import State, read_state, stage_key

_COMPARISON_NAME = "comparison.html"


def report(run_dirs: Sequence[str | Path], *, output: str | Path | None, num_samples: int | None) -> Path:
    """Writes the report of a run, or of several side by side; returns its path.

    Args:
        run_dirs: Run directories, at least one; they may be at work.
        output: The file; None: `report.html` in the run directory, or `comparison.html`
            where the command is given, for several.
        num_samples: Prompts whose texts are in it, for each run; None: as many as usual.

    Raises:
        ConfigError: A directory holds no run.
        DataError: The file cannot be written.
    """
    from nemo_spin.report.write import DEFAULT_SAMPLES, write_report

    runs = [RunDirectory(Path(run_dir).expanduser().absolute()) for run_dir in run_dirs]
    for run in runs:
        _check(run)
    usual = runs[0].report_path if len(runs) == 1 else Path(_COMPARISON_NAME).absolute()
    path = usual if output is None else Path(output).expanduser().absolute()
    wanted = DEFAULT_SAMPLES if num_samples is None else num_samples
    write_report([run_source(run) for run in runs], path, num_samples=wanted)
    return path


def refresh(run: RunDirectory, *, warn: Callable[[str], None]) -> None:
    """Writes the run's report anew. Whatever goes wrong is a warning: a run never fails of it."""
    try:
        report([run.path], output=None, num_samples=None)
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0]
        warn(f"{run.report_path.name} could not be written: {said or type(error).__name__}")


def run_source(run: RunDirectory) -> RunSource:
    """A run as a report takes it: its iterations, and the plain fine-tuning where there is one."""
    state = read_state(run.state_path) or State()
    parts = [PartSource(i, run.iteration(i), _times(state, i)) for i in run.existing_iterations()]
    if run.sft.metrics_path.exists():
        parts.insert(0, PartSource(None, run.sft, _times(state, None, ("sft", "export"))))
    return RunSource(
        path=run.path,
        config_path=run.config_path,
        data_dir=run.data_dir,
        parts=tuple(parts),
        status=state.status if state.stages else "",
        host=state.owner.host if state.owner else "",
        times=_times(state, None, ("prepare", "evaluate", "import-hf")),
    )


def _times(state: State, iteration: int | None, stages: Sequence[str] = STAGES) -> dict[str, StageTime]:
    entries = {stage: state.stages.get(stage_key(stage, iteration)) for stage in stages}
    return {
        stage: StageTime(entry.earlier_seconds + (entry.seconds or 0.0), entry.attempts)
        for stage, entry in entries.items()
        if entry is not None and (entry.seconds is not None or entry.earlier_seconds)
    }


def _check(run: RunDirectory) -> None:
    if run.config_path.exists():
        return
    raise ConfigError(
        explain(
            str(run.path),
            found="holds no run" if run.path.is_dir() else "there is no such directory",
            rule="the run_dir (or sft.output) of an earlier command",
            remedy="check the path",
        )
    )
