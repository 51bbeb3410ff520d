"""The two ways to show a running stage: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any, Protocol, TextIO

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

_PLAIN_INTERVAL_S = 5.0
_PLAIN_WIDTH = 120


class Display(Protocol):
    """Shows one stage after the other; see `Screen` for the meaning of its methods."""

    def begin(self, label: str) -> None:
        """A stage begins."""

    def update(self, done: int, total: int, unit: str, **values: Any) -> None:
        """See `nemo_spin.data.progress.Progress`."""

    def note(self, text: str) -> None:
        """One line worth a user's attention."""

    def end(self, line: str | None) -> None:
        """The stage ended; `line` says with what result (None: it failed)."""

    def show(self, content: RenderableType) -> None:
        """A table or a line."""


class Pace:
    """How fast one thing goes, and what that leaves.

    The clock starts at the first count that differs from the one before: until then a
    stage loads and warms up.
    """

    def __init__(self, done: int) -> None:
        self._start(done, counting=False)

    def _start(self, done: int, *, counting: bool) -> None:
        self._first = self._last = done
        self._counting = counting
        self._since = time.monotonic()
        self.rate = 0.0

    def seen(self, done: int) -> None:
        """Updates the rate (per second); a count that falls is another thing that begins."""
        if done < self._last:
            self._start(done, counting=False)
        elif done > self._last and not self._counting:
            self._start(done, counting=True)
        self._last = done
        elapsed = time.monotonic() - self._since
        if elapsed > 0:
            self.rate = (done - self._first) / elapsed

    def describe(self, done: int, total: int, unit: str) -> str:
        """Such as `12/50 steps, 3.1/s, 12 s left`."""
        text = f"{done:,}/{total:,} {unit if unit.endswith('s') else unit + 's'}"
        if self.rate:
            text += f", {_rate(self.rate, unit)}"
            if done < total:
                text += f", {duration((total - done) / self.rate)} left"
        return text


def _rate(rate: float, unit: str) -> str:
    return f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"


def duration(seconds: float) -> str:
    """`45 s`, `3:05` (minutes), `2:03:05` (hours)."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d} min"


def _values(values: dict[str, Any]) -> str:
    return "  ".join(f"{key} {_number(value)}" for key, value in values.items())


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class TerminalDisplay:
    """Live bars on a terminal.

    Args:
        console: Where to draw.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._label = ""
        self._bars: Progress | None = None
        self._task = TaskID(0)
        self._unit = ""
        self._pace = Pace(0)

    def begin(self, label: str) -> None:
        """Draws an empty bar."""
        self._label, self._unit = label, ""
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[pace]}"),
            _Elapsed(time.monotonic()),
            console=self._console,
            transient=True,
        )
        self._task = self._bars.add_task(escape(label), total=None, pace="")
        self._bars.start()

    def update(self, done: int, total: int, unit: str, **values: Any) -> None:
        """Moves the bar; a stage may count several things one after the other."""
        if self._bars is None:
            return
        if unit != self._unit:
            self._unit, self._pace = unit, Pace(done)
        self._pace.seen(done)
        text = "  ".join(filter(None, (self._pace.describe(done, total, unit), _values(values))))
        self._bars.update(self._task, completed=done, total=total, pace=escape(text))

    def note(self, text: str) -> None:
        """Prints above the bar."""
        self._console.print(Text(f"  {text}", style="yellow"))

    def end(self, line: str | None) -> None:
        """Replaces the bar by a line."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
        if line is not None:
            self._console.print(Text.assemble(("✓ ", "green"), (f"{self._label}", "bold"), f": {line}"))

    def show(self, content: RenderableType) -> None:
        """Prints a table."""
        self._console.print(content)


class _Elapsed(ProgressColumn):
    """How long the stage has been running."""

    def __init__(self, began: float) -> None:
        super().__init__()
        self._began = began

    def render(self, task: Task) -> Text:
        """See rich."""
        return Text(duration(time.monotonic() - self._began), style="progress.elapsed")


class PlainDisplay:
    """Lines for a log file or a pipe.

    Args:
        stream: Where to write.
        interval_s: Least seconds between two lines of progress.
    """

    def __init__(self, stream: TextIO, interval_s: float = _PLAIN_INTERVAL_S) -> None:
        self._stream = stream
        self._interval_s = interval_s
        self._label = ""
        self._last = 0.0
        self._unit = ""
        self._pace = Pace(0)

    def begin(self, label: str) -> None:
        """Says which stage begins."""
        self._label, self._unit = label, ""
        self._last = time.monotonic()
        self._line(f"{label} …")

    def update(self, done: int, total: int, unit: str, **values: Any) -> None:
        """Writes a line, if the last one is long enough ago."""
        if unit != self._unit:
            self._unit, self._pace = unit, Pace(done)
        self._pace.seen(done)
        now = time.monotonic()
        if now - self._last < self._interval_s:
            return
        self._last = now
        text = "  ".join(filter(None, (self._pace.describe(done, total, unit), _values(values))))
        self._line(f"{self._label}: {text}")

    def note(self, text: str) -> None:
        """Writes the line."""
        self._line(f"  {text}")

    def end(self, line: str | None) -> None:
        """Writes the result."""
        if line is not None:
            self._line(f"{self._label}: {line}")

    def show(self, content: RenderableType) -> None:
        """Writes a table without colours."""
        Console(file=self._stream, width=_PLAIN_WIDTH, no_color=True, highlight=False).print(content)
        self._stream.flush()

    def _line(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()
