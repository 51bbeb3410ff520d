"""Commands on several hosts, of which rank 0's gives orders: real processes, simulated hosts.

Hosts are network namespaces where this machine lets us make them, else loopback addresses.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.functional.commands import environment

# A command in short: two stages in all ranks, in the place of the loop.
COMMAND = """
import os, sys, time
from pathlib import Path
from nemo_spin import cli
from nemo_spin.config.load import from_mapping
from nemo_spin.errors import NemoSpinError
from nemo_spin.launch.choice import launching
from nemo_spin.selfplay.following import follow
from nemo_spin.data.progress import SilentProgress
from nemo_spin.selfplay.launcher import Job
from nemo_spin.selfplay.signals import stop_on_signals

here = Path(sys.argv[1])
launcher = dict(name="external", join_timeout_s=float(sys.argv[2]), silence_timeout_s=2.0)
config = from_mapping(dict(run_dir=str(here / "run"), trainer=dict(num_nodes=2), launcher=launcher))

def command(options):
    with launching(config, config.run_dir) as started:
        if started is None:
            return
        with stop_on_signals():
            for number in range(2):
                progress = here / "progress.jsonl"
                name = f"stage {number}"
                job = Job(name, "stage_body", (str(number),), 2, here / "logs", progress, 1)
                running = started.start(job)
                follow(running, name=name, progress_path=progress, progress=SilentProgress(), timeout_s=60.0,
                       interrupt=running.interrupt, grace_s=20.0)

cli._parse = lambda arguments: type("Options", (), dict(function=staticmethod(command)))
sys.exit(cli.main([]))
"""


@dataclass
class Hosts:
    """Two hosts, and the commands on them."""

    place: Path
    prefixes: list[list[str]]
    addresses: list[str]
    cut: Callable[[], None] | None
    interfaces: list[str]
    commands: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, rank: int, *, join_s: float = 30.0, **more: str) -> subprocess.Popen[str]:
        """Starts the command of a rank on its host, as torchrun would."""
        given = {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": self.addresses[0],
            "MASTER_PORT": "29500",
            "GLOO_SOCKET_IFNAME": self.interfaces[rank],
        }
        python_path = f"{self.place}{os.pathsep}{environment()['PYTHONPATH']}"
        started = subprocess.Popen(
            [*self.prefixes[rank], sys.executable, "-c", COMMAND, str(self.place), str(join_s)],
            env={**environment(), **given, "PYTHONPATH": python_path, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.commands.append(started)
        return started

    def body(self, text: str) -> None:
        """What every rank does in each stage."""
        preamble = "import os, signal, sys, time\nfrom pathlib import Path\n"
        preamble += f"rank, stage, here = int(os.environ['RANK']), sys.argv[1], Path({str(self.place)!r})\n"
        (self.place / "stage_body.py").write_text(preamble + textwrap.dedent(text))


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with contextlib.ExitStack() as stack:
        made = _namespaces(tmp_path, stack) or Hosts(
            tmp_path, [[], []], ["127.0.0.2", "127.0.0.3"], None, ["lo", "lo"]
        )
        yield made
        for command in made.commands:
            command.kill()
            command.communicate()


def _namespaces(place: Path, stack: contextlib.ExitStack) -> Hosts | None:
    """Two network namespaces joined by a cable; None where they cannot be made."""
    ip = shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if ip is None:
        return None
    names = [f"spin{os.getpid()}{side}" for side in "ab"]
    cables = [f"v{os.getpid() % 10**8}{side}" for side in "ab"]

    def tell(*words: str) -> bool:
        return subprocess.run([ip, *words], capture_output=True, check=False).returncode == 0

    for name in names:
        stack.callback(tell, "netns", "delete", name)
    worked = all(tell("netns", "add", name) for name in names)
    worked = worked and tell("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
    for number, (name, cable) in enumerate(zip(names, cables, strict=True)):
        worked = (
            worked
            and tell("link", "set", cable, "netns", name)
            and tell("-n", name, "address", "add", f"10.99.0.{number + 1}/24", "dev", cable)
            and tell("-n", name, "link", "set", "lo", "up")
            and tell("-n", name, "link", "set", cable, "up")
        )
    if not worked:
        return None

    def cut() -> None:
        assert tell("-n", names[1], "link", "set", cables[1], "down")

    prefixes = [[ip, "netns", "exec", name] for name in names]
    return Hosts(place, prefixes, ["10.99.0.1", "10.99.0.2"], cut, cables)


def output(command: subprocess.Popen[str], timeout_s: float = 120) -> str:
    return command.communicate(timeout=timeout_s)[0]


def await_files(*paths: Path) -> None:
    end = time.monotonic() + 30
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, f"not all of {paths} came to be"
        time.sleep(0.02)


def test_two_hosts_meet_in_every_stage_though_one_is_slow(hosts: Hosts) -> None:
    """The late one comes three seconds after the other; the ranks then meet over gloo."""
    hosts.body(
        """
        if stage == "0":
            import torch
            from torch import distributed
            distributed.init_process_group("gloo")
            total = torch.tensor([rank + 1.0])
            distributed.all_reduce(total)
            assert total.item() == 3.0
            distributed.destroy_process_group()
        (here / f"met.{stage}.{rank}").touch()
        """
    )
    first = hosts.start(0)
    time.sleep(3)
    second = hosts.start(1)
    assert output(first) == "" and output(second) == ""
    assert (first.returncode, second.returncode) == (0, 0)
    assert sorted(path.name for path in hosts.place.glob("met.*")) == [
        "met.0.0",
        "met.0.1",
        "met.1.0",
        "met.1.1",
    ]
    assert not (hosts.place / "run" / ".external.json").exists()


def test_a_rank_that_fails_ends_all_and_is_shown_where_rank_0_is(hosts: Hosts) -> None:
    hosts.body("time.sleep(60 * (1 - rank))\nraise ValueError('the loss is not finite')")
    first, second = hosts.start(0), hosts.start(1)
    began = time.monotonic()
    said, heard = output(first), output(second)
    assert time.monotonic() - began < 20
    assert "stage 0: rank 1 ended with exit code 1 (ValueError: the loss is not finite)" in said
    assert f"log: {hosts.place}/logs/stage-0.rank_1.log" in said and "Traceback" not in said.partition("|")[0]
    assert heard == "error: rank 0 ended with exit code 1; why is on its screen\n"
    assert (first.returncode, second.returncode) == (1, 1)


def test_a_host_that_disappears_is_named_within_the_time_out(hosts: Hosts) -> None:
    """Its cable is pulled, so that nobody is told; where there is no cable it is killed."""
    hosts.body("(here / f'pid.{rank}').write_text(str(os.getpid()))\ntime.sleep(60)")
    first, second = hosts.start(0), hosts.start(1)
    await_files(hosts.place / "pid.0", hosts.place / "pid.1")
    began = time.monotonic()
    if hosts.cut is not None:
        hosts.cut()
    else:
        second.kill()
    said = output(first)
    assert time.monotonic() - began < 10
    assert "stage 0: rank 1 is gone with its host" in said
    if hosts.cut is not None:
        assert "said nothing for 2 s" in said
        assert "rank 0 is gone (said nothing for 2 s)" in output(second)
    assert first.returncode == 1 and second.wait(10) != 0
    for rank in range(2):
        pid = (hosts.place / f"pid.{rank}").read_text()
        end = time.monotonic() + 5
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < end, f"rank {rank} lives on"
            time.sleep(0.02)


def test_a_host_that_does_not_come_is_missed_by_name(hosts: Hosts) -> None:
    said = output(hosts.start(0, join_s=1.0))
    assert "rank 1 did not come within 1 s" in said
    said = output(hosts.start(1, join_s=1.0))
    assert "rank 0 could not be reached within 1 s (no " in said


def test_a_follower_that_is_told_to_leave_has_all_ranks_save(hosts: Hosts) -> None:
    hosts.body(
        """
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        (here / f"ready.{rank}").write_text(str(os.getpid()))
        time.sleep(60)
        """
    )
    first, second = hosts.start(0), hosts.start(1)
    await_files(hosts.place / "ready.0", hosts.place / "ready.1")
    for rank in range(2):  # Slurm's signal comes to every process: these leave it to their commands
        os.kill(int((hosts.place / f"ready.{rank}").read_text()), signal.SIGUSR1)
    second.send_signal(signal.SIGUSR1)
    said = output(first)
    assert first.returncode == 75, said
    assert "was told to leave; the same command goes on from what is saved" in said
    assert "exit code 75" in output(second) and second.returncode == 75


def test_strangers_are_not_obeyed_and_do_not_count(hosts: Hosts) -> None:
    """Neither a wrong token nor rubbish keeps the real rank from coming."""
    hosts.body("")
    first = hosts.start(0)
    door = hosts.place / "run" / ".external.json"
    await_files(door)
    assert door.stat().st_mode & 0o777 == 0o600
    stranger = (
        "import json, socket, sys; door = json.load(open(sys.argv[1]))\n"
        'for text in (\'{"kind": "hello", "rank": 1, "token": "x"}\', \'GET / HTTP/1.1\', \'[1]\'):\n'
        "    line = socket.create_connection((door['address'], door['port']))\n"
        "    line.sendall(text.encode() + b'\\n'); assert line.recv(1) == b''\n"
    )
    subprocess.run([*hosts.prefixes[1], sys.executable, "-c", stranger, str(door)], check=True, timeout=30)
    second = hosts.start(1)
    assert (output(first), output(second)) == ("", "")
