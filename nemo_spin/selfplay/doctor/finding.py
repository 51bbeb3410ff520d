"""One line of a diagnosis."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """Something that was looked at.

    Attributes:
        name: What was looked at, such as `torch`.
        text: What was found.
        status: `error` where a run would fail; `warning` where it would be slow or may surprise.
        remedy: What the user can do; empty where all is well.
    """

    name: str
    text: str
    status: Status = "ok"
    remedy: str = ""


def output_of(command: Sequence[str], *, timeout_s: float) -> str | None:
    """What a program prints; None where it is not there, fails or takes longer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
