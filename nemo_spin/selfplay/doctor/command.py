"""`nemo-spin doctor`: all that is looked at, as lines or as data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from omegaconf import MISSING

from nemo_spin.config.schema import Config
from nemo_spin.errors import MachineError
from nemo_spin.selfplay.doctor.collectives import examine_collectives
from nemo_spin.selfplay.doctor.finding import Finding
from nemo_spin.selfplay.doctor.kernels import examine_kernels
from nemo_spin.selfplay.doctor.machine import examine_machine
from nemo_spin.selfplay.doctor.packages import examine_packages

_MARKS = {"ok": " ", "warning": "!", "error": "x"}


def examine(config: Config, *, quick: bool) -> list[Finding]:
    """What a run needs of this machine, looked at in seconds.

    Args:
        config: Names the run directory, the model and the sampler's interpreter.
        quick: Write no file and start no ranks, so that a run beside it is not disturbed.
    """
    run_dir = Path("." if config.run_dir == MISSING else config.run_dir).expanduser()
    return [
        *examine_packages(config),
        *examine_machine(run_dir, writes=not quick),
        *examine_kernels(config),
        *([] if quick else examine_collectives()),
    ]


def written(findings: Sequence[Finding], *, as_data: bool) -> str:
    """The findings for a reader, or as a JSON list for scripts."""
    if as_data:
        return json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2)
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{_MARKS[finding.status]} {finding.name:{width}}  {finding.text}")
        if finding.remedy:
            lines.append(f"  {'':{width}}  remedy: {finding.remedy}")
    counts = {
        status: sum(finding.status == status for finding in findings) for status in ("error", "warning")
    }
    problems = [f"{count} {status}{'s' if count > 1 else ''}" for status, count in counts.items() if count]
    return "\n".join([*lines, ", ".join(problems) or "all is well"])


def refuse_errors(findings: Sequence[Finding]) -> None:
    """Raises where a run would fail.

    Raises:
        MachineError: The names of what is wrong.
    """
    wrong = [finding.name for finding in findings if finding.status == "error"]
    if wrong:
        raise MachineError(f"a run would fail here because of: {', '.join(wrong)} (remedies above)")
