from __future__ import annotations

import os
import pty
import re
import threading
from io import StringIO

import pytest

from nemo_spin.errors import DataError
from nemo_spin.selfplay import displays
from nemo_spin.selfplay.displays import Pace, PlainDisplay, duration
from nemo_spin.selfplay.screen import Screen


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(displays.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_are_some_seconds_apart(clock: list[float]) -> None:
    stream = StringIO()
    display = PlainDisplay(stream, interval_s=5)
    display.begin("train of iteration 0")
    for step in range(101):
        display.update(step, 100, "step", loss=0.69314718)
        clock[0] += 0.2
    display.end("100 steps")
    assert stream.getvalue().splitlines() == [
        "train of iteration 0 …",
        "train of iteration 0: 25/100 steps, 5.0/s, 15 s left  loss 0.6931",
        "train of iteration 0: 50/100 steps, 5.0/s, 10 s left  loss 0.6931",
        "train of iteration 0: 75/100 steps, 5.0/s, 5.0 s left  loss 0.6931",
        "train of iteration 0: 100/100 steps, 5.0/s  loss 0.6931",
        "train of iteration 0: 100 steps",
    ]


def test_the_pace_does_not_count_warming_up(clock: list[float]) -> None:
    pace = Pace(0)
    clock[0] += 60
    pace.seen(1)
    assert pace.describe(1, 9, "steps") == "1/9 steps"
    clock[0] += 2
    pace.seen(5)
    assert pace.describe(5, 9, "steps") == "5/9 steps, 2.0/s, 2.0 s left"


def test_the_pace_of_a_resumed_stage_counts_what_is_new(clock: list[float]) -> None:
    pace = Pace(1000)
    clock[0] += 1
    pace.seen(1010)
    clock[0] += 10
    pace.seen(1020)
    assert pace.rate == 1.0


def test_a_count_that_falls_is_another_thing(clock: list[float]) -> None:
    pace = Pace(0)
    for done in (10, 20):
        clock[0] += 1
        pace.seen(done)
    pace.seen(0)
    assert pace.describe(0, 5, "rows") == "0/5 rows"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.96, "10.0 s"),
        (45.3, "45 s"),
        (59.7, "1:00 min"),
        (125, "2:05 min"),
        (7385, "2:03:05"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_failed_stage_has_no_result() -> None:
    stream = StringIO()
    screen = Screen(stream)
    with pytest.raises(DataError), screen.stage("score"):
        screen.result("looked fine")
        raise DataError("full")
    assert stream.getvalue() == "score …\n"


def test_notes_and_results() -> None:
    stream = StringIO()
    screen = Screen(stream)
    with screen.stage("prepare"):
        screen.note("2 rows [bold]refused[/bold]")
        screen.result("48 rows")
    assert stream.getvalue().splitlines() == [
        "prepare …",
        "  2 rows [bold]refused[/bold]",
        "prepare: 48 rows",
    ]


def on_terminal(action: object) -> str:
    """What `action(screen)` draws on a terminal of 100 columns."""
    leader, follower = pty.openpty()
    drawn: list[bytes] = []

    def read() -> None:
        try:
            while piece := os.read(leader, 65536):
                drawn.append(piece)
        except OSError:
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(follower, "w") as stream:
        action(Screen(stream))  # type: ignore[operator]
    reader.join(timeout=10)
    os.close(leader)
    return b"".join(drawn).decode()


def test_a_terminal_gets_a_bar_and_then_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")

    def action(screen: Screen) -> None:
        with screen.stage("train of iteration 0"):
            for step in range(1, 21):
                screen.update(step, 20, "step", loss=0.5)
                threading.Event().wait(0.02)
            screen.note("a note [red]in brackets[/red]")
            screen.result("20 steps [1]")

    drawn = on_terminal(action)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn)
    assert "━" in plain
    assert re.search(r"/20 steps, [\d.]+/s", plain)
    assert "a note [red]in brackets[/red]" in plain
    assert plain.rstrip().endswith("✓ train of iteration 0: 20 steps [1]")


def test_an_error_leaves_the_terminal_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")

    def action(screen: Screen) -> None:
        with pytest.raises(KeyboardInterrupt), screen.stage("train"):
            raise KeyboardInterrupt

    drawn = on_terminal(action)
    assert drawn.count("\x1b[?25l") == drawn.count("\x1b[?25h") >= 1, "the cursor is shown again"
