"""Writes the report of one run, or of several side by side."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nemo_spin
from nemo_spin.data.files import write_text
from nemo_spin.report.notes import Notes
from nemo_spin.report.page import render
from nemo_spin.report.pair_values import PairValues, pair_values
from nemo_spin.report.samples import collect_samples
from nemo_spin.report.sources import RunSource
from nemo_spin.report.summary import part_label, summarise_run

DEFAULT_SAMPLES = 1000


def write_report(runs: Sequence[RunSource], path: Path, *, num_samples: int = DEFAULT_SAMPLES) -> None:
    """Writes the HTML file, from whatever is there so far.

    Args:
        runs: The runs, in the order they are shown in.
        path: The file.
        num_samples: Prompts whose texts are in it, for each run.

    Raises:
        DataError: The file cannot be written.
    """
    assert runs, "a report of nothing"
    names = display_names([run.path for run in runs])
    summaries, samples = [], []
    for run, name in zip(runs, names, strict=True):
        notes = Notes()
        values = _values(run, notes)
        summary = summarise_run(run, values, name=name, notes=notes)
        samples.append(collect_samples(run, values, limit=num_samples, notes=notes).as_plain())
        summaries.append({**summary, "notes": notes.lines})
    written = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    everything: dict[str, Any] = {"version": nemo_spin.__version__, "written": written, "runs": summaries}
    write_text(path, render(everything, samples, title=f"{' · '.join(names)} – nemo-spin"))


def _values(run: RunSource, notes: Notes) -> list[PairValues]:
    values = []
    for index, part in enumerate(run.parts):
        following = run.parts[index + 1] if index + 1 < len(run.parts) else None
        found = PairValues()
        with notes.instead_of_failing(f"pairs of {part_label(part)}"):
            found = pair_values(part, following)
        values.append(found)
    return values


def display_names(paths: Sequence[Path]) -> list[str]:
    """Names that tell the directories apart: the last parts of their paths, as few as it takes."""
    absolute = [Path(os.path.abspath(path)) for path in paths]
    longest = max(len(path.parts) for path in absolute)
    names: list[str] = []
    for depth in range(1, longest + 1):
        names = ["/".join(path.parts[-depth:]) for path in absolute]
        if len(set(names)) == len(set(absolute)):
            break
    return names
