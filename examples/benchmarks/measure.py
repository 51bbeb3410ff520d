"""Runs of alternatives, one after the other and again, and what they say together.

Alternatives take turns (A B A B …), so that a machine that becomes slower does not
decide between them; ratios are formed within a turn. A run is a process of its own.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Run = dict[str, float]  # what one run measured, by name


def take_turns(
    alternatives: Mapping[str, tuple[Callable[..., Run], tuple[Any, ...]]], repeats: int
) -> dict[str, list[Run]]:
    """Runs each (function, arguments) `repeats` times, in turns; functions are pickled by name."""
    runs: dict[str, list[Run]] = {name: [] for name in alternatives}
    for _ in range(repeats):
        for name, (function, arguments) in alternatives.items():
            measured = in_a_process(function, *arguments)
            runs[name].append(measured)
            if "seconds" in measured:
                print(f"{name}: {measured['seconds']:.2f} s", flush=True)
    return runs


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function(*arguments)` returns in a new process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(_quietly, function, *arguments).result()


def _quietly(function: Callable[..., Any], *arguments: Any) -> Any:
    warnings.simplefilter("ignore")  # of Megatron, that Transformer Engine and Apex are not there
    return function(*arguments)


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and all values."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "values": list(values),
    }


def column(runs: Sequence[Run], name: str) -> list[float]:
    """One number of each run."""
    return [run[name] for run in runs]


def ratios(one: Sequence[Run], other: Sequence[Run], name: str) -> list[float]:
    """`name` of one alternative over that of the other, turn by turn."""
    return [a[name] / b[name] for a, b in zip(one, other, strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and extremes, such as `1.21 (1.19-1.25)`."""
    low, high = min(values), max(values)
    text = f"{statistics.median(values):,.{digits}f}"
    return text if len(values) == 1 else f"{text} ({low:,.{digits}f}-{high:,.{digits}f})"


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table: the first column is a name, the others are numbers."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)


def back_free_memory(num_bytes: int) -> None:
    """Touches free memory and gives it back, so that what is measured next finds it fast.

    On a virtual machine the host provides a page when it is first touched, which takes longer
    than writing it to a disk: without this, whatever runs after a large process has ended is ahead.
    """
    available = os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    mmap.mmap(-1, max(1, min(num_bytes, available // 2)), flags=flags).close()


class PeakMemory:
    """The process's resident memory: now, and the most since `reset` (Linux)."""

    @staticmethod
    def reset() -> None:
        """Begins anew. Where the kernel refuses, the peak is that of the whole process."""
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            return

    @staticmethod
    def now() -> int:
        """Bytes."""
        return _status("VmRSS")

    @staticmethod
    def peak() -> int:
        """Bytes."""
        return _status("VmHWM")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
