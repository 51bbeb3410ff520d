"""`nemo-spin status`: what is done in a run directory, what is running, how long it took."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from nemo_spin.data.files import MANIFEST_NAME
from nemo_spin.errors import ConfigError, explain
from nemo_spin.selfplay.benchmarks import run_benchmarks, status_lines
from nemo_spin.selfplay.displays import duration
from nemo_spin.selfplay.lock import read_owner
from nemo_spin.selfplay.run_directory import IterationDirectory, RunDirectory
from nemo_spin.selfplay.state import (
    DONE,
    FAILED,
    IDLE,
    INTERRUPTED,
    RUNNING,
    STOPPED,
    State,
    read_state,
    stage_key,
)

_TAIL_BYTES = 4096


def describe(run_dir: str | Path) -> str:
    """The state of a run in a few lines. Nothing is hashed and nothing is written.

    Raises:
        ConfigError: The directory holds no run.
    """
    run = RunDirectory(Path(run_dir).expanduser().absolute())
    state = read_state(run.state_path)
    if state is None and not run.config_path.exists():
        raise ConfigError(
            explain(
                str(run.path),
                found="holds no run" if run.path.is_dir() else "there is no such directory",
                rule="the run_dir (or sft.output) of an earlier command",
                remedy="check the path",
            )
        )
    state = state or State()
    lines = [f"{run.path}: {_headline(run, state)}"]
    if state.error and state.status in (FAILED, INTERRUPTED, STOPPED):
        lines.append(f"  {state.error}")
    lines += [f"  {line}" for line in _stage_lines(run, state)]
    benchmarks = run_benchmarks(run)
    if benchmarks is not None:
        lines += ["  benchmarks, percent", *(f"    {line}" for line in status_lines(benchmarks))]
    return "\n".join(lines)


def _headline(run: RunDirectory, state: State) -> str:
    where = state.stage or "nothing"
    if state.iteration is not None:
        where += f" of iteration {state.iteration}"
    if state.status == RUNNING:
        return _running_headline(run, state, where)
    return {
        DONE: "done",
        IDLE: "nothing is running",
        FAILED: f"failed in {where}",
        INTERRUPTED: f"interrupted in {where}",
        STOPPED: f"stopped by a guard after {where}",
    }.get(state.status, state.status)


def _running_headline(run: RunDirectory, state: State, where: str) -> str:
    owner = state.owner
    alive = owner.alive() if owner is not None else False
    if owner is None or alive is False:
        return f"interrupted in {where} (its process is gone; the same command goes on)"
    current = state.current()
    since = f", for {duration(time.time() - current.started_at)}" if current and alive else ""
    place = f"process {owner.pid} on {owner.host}"
    if alive is None:
        seen = f"last sign of life {duration(max(0.0, time.time() - state.updated_at))} ago"
        held = "" if read_owner(run.lock_path) == owner else "; it no longer holds the lock"
        return f"running {where} ({place}, which cannot be seen from here; {seen}{held})"
    return f"running {where}{since}{_progress(run, state)} ({place})"


def _progress(run: RunDirectory, state: State) -> str:
    """How far the current stage is, by the end of its progress file."""
    logs = run.logs if state.iteration is None else run.iteration(state.iteration).logs
    name = f"{state.stage}.progress.jsonl"
    for path in (logs / name, run.iteration(0).logs / f"{state.stage}-theta_0.progress.jsonl"):
        try:
            with path.open("rb") as stream:
                size = stream.seek(0, 2)
                stream.seek(max(0, size - _TAIL_BYTES))
                lines = stream.read().decode("utf-8", "replace").splitlines()
        except OSError:
            continue
        for line in reversed(lines):
            event = _parse(line)
            if event.get("event") == "update":
                return f", {event['done']:,}/{event['total']:,} {event['unit'].removesuffix('s')}s"
    return ""


def _parse(line: str) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def _stage_lines(run: RunDirectory, state: State) -> list[str]:
    """One line per iteration: every stage with its time."""
    lines = []
    first = {"prepare": run.data_dir}
    if "sft" in state.stages:
        first |= {"sft": run.sft.train, "export": run.sft.model}
    lines.append(_line("", first, state, None))
    for iteration in run.existing_iterations():
        files = run.iteration(iteration)
        if iteration == 0 and (files.opponent_evaluation.exists() or "evaluate" in state.stages):
            lines.append(_line("theta_0", {"evaluate": files.opponent_evaluation}, state, None))
        lines.append(_line(f"iteration {iteration}", _directories(files), state, iteration))
    return lines


def _directories(files: IterationDirectory) -> dict[str, Path]:
    return {
        "generate": files.generated,
        "score": files.scored,
        "train": files.train,
        "export": files.model,
        "evaluate": files.evaluation,
    }


def _line(title: str, directories: dict[str, Path], state: State, iteration: int | None) -> str:
    cells = []
    for stage, directory in directories.items():
        entry = state.stages.get(stage_key(stage, iteration))
        is_current = (state.stage, state.iteration) == (stage, iteration)
        if (directory / MANIFEST_NAME).exists():
            took = entry.seconds + entry.earlier_seconds if entry and entry.seconds is not None else None
            cells.append(f"{stage} done" + (f" ({duration(took)})" if took is not None else ""))
        elif is_current and entry is not None:
            attempts = f", attempt {entry.attempts}" if entry.attempts > 1 else ""
            cells.append(f"{stage} {'begun' if entry.status == RUNNING else entry.status}{attempts}")
        elif entry is not None:
            cells.append(f"{stage} begun")
        else:
            cells.append(f"{stage} –")
    return f"{title:<12} {'  '.join(cells)}".rstrip()
