"""What a rank's log says about its end, for the message that the command shows and judges by.

Python's exceptions are the last lines of a log. Where C++ ends the process, as NCCL's watchdog
does, the reason comes first: after it the frames of C++ are listed, and every thread of Python.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from nemo_spin.selfplay.faults import fault_in

_LINES = 15
_BYTES = 16 << 10
_ABORT_BYTES = 256 << 10  # frames of all threads of a rank
_LINE = 300  # characters that are shown


def last_lines(log: Path, offset: int, *, most: int = _LINES) -> Sequence[str]:
    """The last lines that a log got after `offset` bytes."""
    return _lines(log, offset, _BYTES)[-most:]


def quoted_end(log: Path, offset: int, *, aborted: bool) -> str:
    """The last lines that a log got, as they are shown.

    Args:
        log: It.
        offset: Bytes that it had before.
        aborted: SIGABRT ended the process: the last line before that tells of a known fault comes first.
    """
    shown = list(last_lines(log, offset))
    if aborted:
        telling = [line for line in _lines(log, offset, _ABORT_BYTES) if fault_in(line) is not None]
        if telling and telling[-1] not in shown:
            shown = [telling[-1], "…", *shown]
    return "".join(f"  | {line}\n" for line in shown)


def _lines(log: Path, offset: int, most_bytes: int) -> list[str]:
    try:
        with log.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(offset, size - most_bytes))
            text = stream.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line[:_LINE] for line in text.splitlines() if line.strip()]
