from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_spin.data.progress import ProgressFile
from nemo_spin.errors import GateError, PreemptedError, StageError
from nemo_spin.selfplay import following
from nemo_spin.selfplay.following import ProgressReader, follow


class Recorder:
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.updates: list[tuple[int, int, str, dict[str, Any]]] = []
        self.notes: list[str] = []

    def update(self, done: int, total: int, unit: str, **values: Any) -> None:
        self.updates.append((done, total, unit, values))

    def note(self, text: str) -> None:
        self.notes.append(text)


class Script:
    """A job that does one thing at each poll and then ends with `code` (None: never)."""

    def __init__(self, steps: list[Callable[[], None]], code: int | None) -> None:
        self._steps, self._code = steps, code
        self.stopped = 0

    def poll(self) -> int | None:
        if self._steps:
            self._steps.pop(0)()
            return None
        return self._code

    def stop(self) -> None:
        self.stopped += 1

    def describe_failure(self) -> str:
        return "  | the last line\n  log: rank_0.log"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "progress.jsonl"


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_POLL_S", 0.001)


def run(job: Script, path: Path, timeout_s: float = 10) -> Recorder:
    recorder = Recorder()
    follow(job, name="train of iteration 0", progress_path=path, progress=recorder, timeout_s=timeout_s)
    return recorder


def test_shows_what_is_reported(path: Path) -> None:
    file = ProgressFile(path)
    job = Script([lambda: file.update(1, 1, "shard", speed=3), lambda: file.note("hello")], 0)
    recorder = run(job, path)
    assert recorder.updates == [(1, 1, "shard", {"speed": 3})]
    assert recorder.notes == ["hello"]


def test_what_was_written_last_is_read_too(path: Path) -> None:
    class EndsAtOnce(Script):
        def poll(self) -> int | None:
            ProgressFile(path).note("a last word")
            return 0

    assert run(EndsAtOnce([], 0), path).notes == ["a last word"]


def test_a_line_that_comes_in_two_pieces(path: Path) -> None:
    line = json.dumps({"event": "note", "text": "in two pieces: ä"}, ensure_ascii=False).encode() + b"\n"
    middle = line.index("ä".encode()) + 1
    reader, recorder = ProgressReader(path), Recorder()
    reader.pump(recorder)
    for piece in (line[:middle], line[middle:] + b'{"event": "no'):
        with path.open("ab") as stream:
            stream.write(piece)
        reader.pump(recorder)
    assert recorder.notes == ["in two pieces: ä"]


def test_damaged_lines_are_skipped(path: Path) -> None:
    path.write_text('{"event": "upd\n[]\n\x00\n{"event": "note", "text": "sound"}\n')
    recorder = Recorder()
    ProgressReader(path).pump(recorder)
    assert recorder.notes == ["sound"]


def test_a_typed_error_is_raised_again(path: Path) -> None:
    file = ProgressFile(path)
    job = Script([lambda: file.error(GateError("ln 2 gate: 0.9\n  rule: 0.693"))], 2)
    with pytest.raises(GateError, match=r"^ln 2 gate: 0\.9\n  rule: 0\.693$"):
        run(job, path)
    assert job.stopped


def test_ranks_that_hang_after_an_error_are_ended(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_GRACE_S", 0.05)
    file = ProgressFile(path)
    job = Script([lambda: file.error(GateError("first")), lambda: file.error(GateError("second"))], None)
    with pytest.raises(GateError, match="first"):
        run(job, path, timeout_s=60)
    assert job.stopped


def test_an_exit_code_without_a_word(path: Path) -> None:
    with pytest.raises(StageError, match=r"train of iteration 0: ended with exit code 9\n  \| the last line"):
        run(Script([], 9), path)


def test_a_time_out(path: Path) -> None:
    job = Script([], None)
    with pytest.raises(StageError, match=r"made no progress for 0 s, and was ended\n  \| the last line"):
        run(job, path, timeout_s=0.02)
    assert job.stopped


def test_what_makes_progress_takes_as_long_as_it_takes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three days of training; then a day of the same step over and over."""
    clock = [0.0]
    monkeypatch.setattr(following.time, "monotonic", lambda: clock[0])

    def work(step: int) -> None:
        clock[0] += 3600.0
        with path.open("a") as stream:  # the step and, in each hour, notes and values that are no progress
            for event in (
                {"event": "note", "text": "still there"},
                {"event": "update", "done": step, "total": 80, "unit": "steps", "values": {"loss": clock[0]}},
            ):
                stream.write(json.dumps(event) + "\n")

    hours = [lambda step=step: work(step) for step in range(1, 73)]
    recorder = run(Script(hours, 0), path, timeout_s=86400.0)
    assert len(recorder.updates) == 72 and clock[0] == 3 * 86400.0
    path.unlink()
    stuck = Script([lambda: work(5)] * 40, 0)
    with pytest.raises(StageError, match="made no progress for 86400 s"):
        run(stuck, path, timeout_s=86400.0)
    assert len(stuck._steps) == 40 - 26 and stuck.stopped


def told_to_stop() -> None:
    raise SystemExit(75)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(75), GateError("of the job itself")])
def test_whatever_happens_the_job_is_stopped(path: Path, error: BaseException) -> None:
    def fail() -> None:
        raise error

    job = Script([fail], 0)
    with pytest.raises(type(error)):
        run(job, path)
    assert job.stopped


@pytest.mark.parametrize("code", [75, 143, 138])  # saved, or ended by SIGTERM or SIGUSR1 before that
def test_ranks_that_were_told_to_leave_have_not_failed(path: Path, code: int) -> None:
    with pytest.raises(PreemptedError, match="train of iteration 0 was told to leave; the same"):
        run(Script([], code), path)


@pytest.mark.parametrize(
    ("code", "error"),
    [(75, PreemptedError), (143, SystemExit), (0, SystemExit), (None, SystemExit)],
    ids=["saved", "had nothing to save", "was done", "took too long"],
)
def test_a_job_that_can_save_is_asked_to_before_it_is_stopped(
    path: Path, code: int | None, error: type[BaseException]
) -> None:
    asked: list[int] = []
    job = Script([told_to_stop, lambda: None], code)
    recorder = Recorder()
    with pytest.raises(error):
        follow(
            job,
            name="train of iteration 0",
            progress_path=path,
            progress=recorder,
            timeout_s=10,
            interrupt=lambda: asked.append(job.stopped),
            grace_s=0.02,
        )
    assert asked == [0] and job.stopped == 1
    assert recorder.notes == ["told to stop: train of iteration 0 saves first, for 0.02 s at most"]


def test_what_ranks_say_about_saving_is_passed_on(path: Path) -> None:
    job = Script([lambda: ProgressFile(path).error(PreemptedError("saved after step 3 of 9"))], 75)
    with pytest.raises(PreemptedError, match=r"^saved after step 3 of 9$"):
        run(job, path)
