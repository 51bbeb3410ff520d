from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from nemo_spin.errors import ConfigError, DataError
from nemo_spin.selfplay import lock
from nemo_spin.selfplay.lock import Owner, locked, read_owner


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.lock"


def write(path: Path, owner: Owner) -> None:
    path.write_text(json.dumps(asdict(owner)))


def dead_process() -> Owner:
    """A process that has just ended, as it was."""
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    return replace(Owner.of_this_process(), pid=process.pid)


def test_names_its_owner_and_goes_away(path: Path) -> None:
    with locked(path):
        owner = read_owner(path)
        assert owner == Owner.of_this_process()
        assert owner.alive()
    assert list(path.parent.iterdir()) == []


def test_goes_away_after_an_error(path: Path) -> None:
    with pytest.raises(RuntimeError), locked(path):
        raise RuntimeError
    assert not path.exists()


def test_a_living_owner_is_respected(path: Path) -> None:
    with locked(path):
        with pytest.raises(ConfigError, match=f"held by process {os.getpid()} on") as caught, locked(path):
            raise AssertionError("both hold the lock")
        assert "another run_dir" in str(caught.value)
        assert path.exists()


def test_a_dead_owner_is_replaced(path: Path) -> None:
    write(path, dead_process())
    with locked(path):
        assert read_owner(path) == Owner.of_this_process()


def test_a_lock_that_is_taken_for_the_dead_ones_is_not_held(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What three commands that start at once can do to each other within microseconds, in slow motion."""
    write(path, dead_process())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as another:
        locker = replace(
            Owner.of_this_process(), pid=another.pid, started=lock._start_ticks(another.pid) or 0
        )
        monkeypatch.setattr(time, "sleep", lambda seconds: write(path, locker))
        with pytest.raises(ConfigError, match=f"held by process {another.pid} on"), locked(path):
            raise AssertionError("two hold the lock")
        another.communicate(b"\n")
    assert read_owner(path) == locker


def test_another_process_with_the_number_of_the_dead_one(path: Path) -> None:
    write(path, replace(Owner.of_this_process(), started=1))
    with locked(path):
        assert read_owner(path) == Owner.of_this_process()


@pytest.mark.parametrize(
    "change", [{"host": "elsewhere", "boot": "b"}, {"boot": "of another start"}, {"namespace": "pid:[1]"}]
)
def test_an_owner_that_cannot_be_seen_is_judged_by_its_heartbeat(
    path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str]
) -> None:
    monkeypatch.setattr(lock, "SILENT_AFTER_S", 0.6)
    owner = replace(Owner.of_this_process(), **change)
    write(path, owner)
    assert owner.alive() is None
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.1):
            os.utime(path)

    heart = threading.Thread(target=beat)
    heart.start()
    notes: list[str] = []
    with pytest.raises(ConfigError, match=f"on {owner.host}"), locked(path, on_wait=notes.append):
        pass
    assert "heartbeat" in notes[0]
    ended.set()
    heart.join()
    with locked(path):  # silent now
        assert read_owner(path) == Owner.of_this_process()


def test_the_heart_beats(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.05)
    with locked(path):
        os.utime(path, ns=(0, 0))
        time.sleep(0.3)
        assert path.stat().st_mtime_ns > 0


def test_a_directory_that_is_gone(path: Path) -> None:
    with pytest.raises(DataError, match="could not be written"), locked(path / "nowhere" / "run.lock"):
        pass


def test_a_file_system_without_hard_links(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(lock.os, "link", link)
    with locked(path):
        assert read_owner(path) == Owner.of_this_process()
        with pytest.raises(ConfigError, match="is running"), locked(path):
            pass


def test_an_answer_that_nfs_lost_and_asked_for_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def asked_twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", asked_twice)
    with locked(path):
        assert read_owner(path) == Owner.of_this_process()
    assert not path.exists()


def test_a_file_without_a_name_is_left_alone(path: Path) -> None:
    path.write_text("")
    with pytest.raises(ConfigError, match="left no name"), locked(path):
        pass
    assert path.exists()


_CONTENDER = """
import sys, time
from pathlib import Path
from nemo_spin.errors import ConfigError, DataError
from nemo_spin.selfplay.lock import locked
while not Path(sys.argv[2]).exists():
    pass
try:
    with locked(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(3)
except ConfigError:
    print("refused", flush=True)
"""


def test_of_many_that_find_a_dead_lock_one_gets_it(path: Path, tmp_path: Path) -> None:
    write(path, dead_process())
    gun = tmp_path / "gun"
    command = [sys.executable, "-c", _CONTENDER, str(path), str(gun)]
    contenders = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    time.sleep(2)
    gun.touch()
    said = [contender.communicate(timeout=60)[0].strip() for contender in contenders]
    assert sorted(said) == ["held"] + ["refused"] * 5


def test_the_lock_of_an_earlier_start_of_the_same_job_is_taken_over_while_its_heart_beats(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm has given up its host, on which the command lives on."""
    waits: list[float] = []
    monkeypatch.setattr(lock.time, "sleep", waits.append)
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    first = Owner.of_this_process()
    assert (first.job, first.restarts) == ("1234", 0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    elsewhere = replace(first, host="node1", boot="of node1")
    for owner in (elsewhere, first):  # this process is alive, and seen to be
        write(path, owner)
        notes: list[str] = []
        with locked(path, on_wait=notes.append):
            assert read_owner(path) == Owner.of_this_process()
        assert "of an earlier start of this job" in notes[0]
        assert 30.0 in waits
        waits.clear()
    write(path, replace(first, pid=dead_process().pid))
    with locked(path):
        assert 30.0 not in waits, "a dead one finds out nothing"


@pytest.mark.parametrize("other", [{"job": "1235"}, {"job": ""}, {"restarts": 2}, {"restarts": 3}])
def test_the_lock_of_another_job_or_the_same_start_is_not_taken_over(
    path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    write(path, replace(Owner.of_this_process(), **{"restarts": 1, **other}))
    with pytest.raises(ConfigError, match="which is running"), locked(path):
        pass


def test_a_lock_of_an_older_version_names_no_job(path: Path) -> None:
    owner = Owner.of_this_process()
    path.write_text(json.dumps({k: v for k, v in asdict(owner).items() if k not in ("job", "restarts")}))
    assert read_owner(path) == replace(owner, job="", restarts=0)


_DISPLACED = """
import subprocess, sys, time
from pathlib import Path
from nemo_spin.selfplay import lock
lock.HEARTBEAT_S = 0.05
with lock.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_an_owner_that_is_not_any_more_the_owner_ends_at_once(path: Path) -> None:
    """It hung, its lock was taken over, and it wakes up in the middle of a stage."""
    with subprocess.Popen(
        [sys.executable, "-c", _DISPLACED, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as displaced:
        assert displaced.stdout is not None and displaced.stdout.readline() == "held\n"
        other = replace(Owner.of_this_process(), host="node2", pid=77)
        partial = path.with_name("partial")
        write(partial, other)
        partial.replace(path)
        _, said = displaced.communicate(timeout=30)
    assert displaced.returncode == -signal.SIGKILL
    assert "was taken over by process 77 on node2: this one ends" in said
    assert read_owner(path) == other


def test_a_file_system_that_does_not_answer_is_no_silence(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look that takes minutes is followed by as long a watch as if it were the first."""
    clock, looks = [0.0], [0]
    stat = Path.stat

    def slow(self: Path, **keywords: Any) -> os.stat_result:
        looks[0] += self == path
        if self == path and looks[0] == 3:
            clock[0] += 120.0  # the server fails over
        if self == path and looks[0] == 10:
            os.utime(path, ns=(1, 1))  # by then the owner could beat again
        return stat(self, **keywords)

    monkeypatch.setattr(lock.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(Path, "stat", slow)
    path.touch()
    assert lock._heart_beats(path)
    assert looks[0] == 10
