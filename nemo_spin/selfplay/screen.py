"""What a user sees while a run is going on.

On a terminal: one bar for the stage that is running, with rate and remaining time, and a
line for every stage that ended. Elsewhere (a log file, a pipe): plain lines, a few
seconds apart.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console

from nemo_spin.selfplay.displays import Display, PlainDisplay, TerminalDisplay

if TYPE_CHECKING:
    from rich.console import RenderableType


class Screen:
    """Shows stages one after the other. While one runs it is that stage's `Progress` too.

    Args:
        stream: Where to write; default: standard output.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        stream = stream or sys.stdout
        terminal = stream.isatty()
        self._display: Display = TerminalDisplay(Console(file=stream)) if terminal else PlainDisplay(stream)
        self._result: str | None = None

    @contextmanager
    def stage(self, label: str) -> Iterator[None]:
        """Shows a stage as running inside the block; then the line that `result` was given.

        Args:
            label: Such as "train of iteration 0".
        """
        self._result = None
        self._display.begin(label)
        try:
            yield
        except BaseException:
            self._result = None
            raise
        finally:
            self._display.end(self._result)

    def result(self, line: str) -> None:
        """What the stage that is about to end has to show, in one line."""
        self._result = line

    def update(self, done: int, total: int, unit: str, **values: Any) -> None:
        """See `nemo_spin.data.progress.Progress`."""
        self._display.update(done, total, unit, **values)

    def note(self, text: str) -> None:
        """One line worth a user's attention."""
        self._display.note(text)

    def show(self, content: RenderableType) -> None:
        """A table or a line, between stages."""
        self._display.show(content)
