"""Real processes: a command, its sampler, and what the sampler has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_spin.generation.lifeline import PARENT_VARIABLE

# The sampler starts a child in its own group, and says who they are.
SAMPLER = """
import os, subprocess, sys, time
from nemo_spin.generation.lifeline import die_with_parent
die_with_parent()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
with open(sys.argv[1] + ".partial", "w") as stream:
    stream.write(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".partial", sys.argv[1])
if sys.argv[2] == "end":
    sys.exit(0)
while True:
    sum(range(10**7))
"""
COMMAND = f"""
import os, subprocess, sys, time
environment = {{**os.environ, {PARENT_VARIABLE!r}: str(os.getpid())}}
subprocess.Popen([sys.executable, "-c", {SAMPLER!r}, *sys.argv[1:]], env=environment, start_new_session=True)
time.sleep(300)
"""


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _group(leader: int) -> list[int]:
    """All live processes of a group."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getpgid(int(entry.name)) == leader and _is_alive(int(entry.name)):
                found.append(int(entry.name))
        except ProcessLookupError:
            continue
    return found


@pytest.fixture
def started(
    tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[subprocess.Popen[bytes], int, int]]:
    """A command, its sampler's number and that of the sampler's child."""
    note = tmp_path / "pids"
    mode = getattr(request, "param", "stay")
    command = subprocess.Popen([sys.executable, "-c", COMMAND, str(note), mode])
    deadline = time.monotonic() + 30
    while not note.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    sampler, child = map(int, note.read_text().split())
    yield command, sampler, child
    command.kill()
    command.wait()
    for pid in _group(sampler):
        os.kill(pid, signal.SIGKILL)


def _ends_soon(leader: int) -> bool:
    deadline = time.monotonic() + 10
    while _group(leader):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
class TestLifeline:
    def test_all_live_while_the_command_lives(
        self, started: tuple[subprocess.Popen[bytes], int, int]
    ) -> None:
        _, sampler, child = started
        time.sleep(1.5)
        assert {sampler, child} <= set(_group(sampler))

    def test_the_whole_group_ends_with_the_command(
        self, started: tuple[subprocess.Popen[bytes], int, int]
    ) -> None:
        command, sampler, _ = started
        command.kill()
        command.wait()
        assert _ends_soon(sampler)

    def test_what_a_killed_sampler_has_started_ends_too(
        self, started: tuple[subprocess.Popen[bytes], int, int]
    ) -> None:
        _, sampler, _ = started
        os.kill(sampler, signal.SIGKILL)
        assert _ends_soon(sampler)

    @pytest.mark.parametrize("started", ["end"], indirect=True)
    def test_a_sampler_that_ended_leaves_nothing(
        self, started: tuple[subprocess.Popen[bytes], int, int]
    ) -> None:
        assert _ends_soon(started[1])


def test_without_a_parent_named_nothing_happens() -> None:
    script = "from nemo_spin.generation.lifeline import die_with_parent; die_with_parent(); print('alive')"
    environment = {name: value for name, value in os.environ.items() if name != PARENT_VARIABLE}
    output = subprocess.run(
        [sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True
    )
    assert output.stdout == "alive\n"


def test_a_parent_that_is_gone_already_ends_it_at_once() -> None:
    script = "from nemo_spin.generation.lifeline import die_with_parent; die_with_parent(); print('alive')"
    environment = {**os.environ, PARENT_VARIABLE: "1"}
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        start_new_session=True,
        check=False,
    )
    assert result.returncode == -signal.SIGKILL
    assert result.stdout == b""
