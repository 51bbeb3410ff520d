"""A report is written from whatever is there: what cannot be read becomes a note in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pyarrow as pa
import yaml

from nemo_spin.errors import NemoSpinError

_UNREADABLE = (
    NemoSpinError,
    OSError,
    pa.ArrowException,
    yaml.YAMLError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
)


class Notes:
    """Collects what a reader of the report should know about its gaps."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        """One line; the same line is kept once."""
        if line not in self.lines:
            self.lines.append(line)

    @contextlib.contextmanager
    def instead_of_failing(self, what: str) -> Iterator[None]:
        """Turns an error inside the block into a note that `what` is missing from the report."""
        try:
            yield
        except _UNREADABLE as error:
            said = (str(error).strip().splitlines() or [""])[0][:300]
            self.add(f"{what}: not in this report ({said or type(error).__name__})")
