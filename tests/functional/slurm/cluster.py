"""A real Slurm on this machine: munged, slurmctld and a slurmd for each of several nodes."""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

_SBIN = "/usr/sbin"  # not in everybody's PATH
_ASKED = 10  # times
_CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={place}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool-%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd-%n.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1,sched_min_interval=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
SlurmdParameters=config_overrides
KillWait=20
NodeName=node[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{last}] CPUs=4 {memory}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no cluster here; None where there can."""
    path = f"{os.environ.get('PATH', '')}:{_SBIN}"
    absent = [
        name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=path)
    ]
    if absent:
        return f"no {', '.join(absent)} here (Debian: apt-get install slurm-wlm munge)"
    if os.getuid() != 0:
        return "slurmd starts jobs as root only"
    return None


class Cluster:
    """Its daemons, and what they are asked.

    Args:
        place: For configuration, state and logs.
        num_nodes: How many, named node1, node2, …
    """

    def __init__(self, place: Path, num_nodes: int = 2) -> None:
        self.place = place
        self.nodes = [f"node{number}" for number in range(1, num_nodes + 1)]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(place / "slurm.conf"),
            "PATH": f"{os.environ.get('PATH', '')}:{_SBIN}",
        }
        place.mkdir()
        (place / "state").mkdir()
        key = place / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        first = _free_ports(num_nodes + 1)
        (place / "slurm.conf").write_text(
            _CONF.format(
                host=socket.gethostname().partition(".")[0],
                user=getpass.getuser(),
                place=place,
                nodes=num_nodes,
                ports=(first, first + 1),
                last=first + num_nodes,
                memory="RealMemory=1000",
            )
        )

    def start(self) -> None:
        """Starts all daemons; returns when the nodes wait for jobs."""
        munge = [f"--{name}={self.place}/munge.{name.partition('-')[0]}" for name in ("socket", "pid-file")]
        self._start(
            "munged",
            *("--foreground", "--force", f"--key-file={self.place}/munge.key", *munge),
            *(f"--log-file={self.place}/munge.log", f"--seed-file={self.place}/munge.seed"),
        )
        _await(lambda: (self.place / "munge.socket").exists(), "munged")
        self._start("slurmctld", "-D")
        for node in self.nodes:
            self.start_node(node)
        _await(lambda: self.states() == ["idle"] * len(self.nodes), f"nodes, logs in {self.place}")

    def start_node(self, node: str) -> None:
        """Boots a node."""
        (self.place / f"spool-{node}").mkdir(exist_ok=True)
        self._start(node, "-D", "-N", node, program="slurmd")

    def kill_node(self, node: str) -> None:
        """Power off: its slurmd, its steps and whatever they started, all at once."""
        self._daemons.pop(node).kill()
        for pid in _processes_of(node, self.environment["SLURM_CONF"]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.ask("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=off")

    def kill_batch_script(self) -> None:
        """SIGKILL for the shell of the job that is running, as where its node runs out of memory."""
        killed = 0
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().decode(errors="replace")
                if words.rstrip("\0").endswith("/slurm_script") and str(self.place) in words:
                    os.kill(int(entry.name), signal.SIGKILL)
                    killed += 1
        assert killed, "no batch script is running"

    def revive_node(self, node: str) -> None:
        """Boots a node that was killed, and gives it to Slurm again."""
        self.start_node(node)
        self.ask("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def ask(self, *command: str, cwd: Path | None = None) -> str:
        """What one of Slurm's commands answers."""
        done = subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def states(self) -> list[str]:
        """Of the nodes, in order."""
        with contextlib.suppress(AssertionError):
            return self.ask("sinfo", "--noheader", "--Node", "--format=%t").split()
        return []

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows about a job, asked again where it is too busy to say."""
        for _ in range(_ASKED):
            with contextlib.suppress(AssertionError):
                words = self.ask("scontrol", "show", "job", "-o", number).split()
                return dict(word.split("=", 1) for word in words if "=" in word)
            time.sleep(1)
        raise AssertionError(f"Slurm does not say what became of job {number}; logs in {self.place}")

    def stop(self) -> None:
        """Ends everything that was started here."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.ask("scancel", "--full", f"--user={getpass.getuser()}")
        for name, daemon in reversed(self._daemons.items()):
            daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(5)
            daemon.kill()
            daemon.wait()
            for pid in _processes_of(name, self.environment["SLURM_CONF"]):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _start(self, name: str, *arguments: str, program: str | None = None) -> None:
        with (self.place / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                [program or name, *arguments], env=self.environment, stdout=out, stderr=out
            )


@contextlib.contextmanager
def running(place: Path, num_nodes: int = 2) -> Iterator[Cluster]:
    """A cluster for the length of the block."""
    cluster = Cluster(place, num_nodes)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _free_ports(count: int) -> int:
    """The first of as many free ports in a row, outside of those that the system hands out."""
    for first in range(20_000, 30_000, count):
        with contextlib.ExitStack() as held:
            try:
                for port in range(first, first + count):
                    probe = held.enter_context(socket.socket())
                    probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise AssertionError("no ports are free")


def _await(condition: object, what: str, timeout_s: float = 30.0) -> None:
    assert callable(condition)
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"{what} did not start within {timeout_s:g} s"
        time.sleep(0.1)


def _processes_of(node: str, configuration: str) -> list[int]:
    """Tasks of a node with all they started, and the stepds above them."""
    parents, found = {}, set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            pid = int(entry.name)
            parents[pid] = int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
            names = (entry / "environ").read_bytes().split(b"\0")
            if (
                f"SLURMD_NODENAME={node}".encode() in names
                and f"SLURM_CONF={configuration}".encode() in names
            ):
                found.add(pid)
    for pid in sorted(found):
        parent = parents.get(pid, 1)
        with contextlib.suppress(OSError):
            if b"slurmstepd" in Path(f"/proc/{parent}/cmdline").read_bytes():
                found.add(parent)
    return [pid for pid in found if pid != os.getpid()]
