"""The batch script in a real Slurm: what becomes of a job that is warned, killed, cancelled, cut off.

The run itself is a stand-in, which waits and leaves when it is told to: here it is Slurm and the
script that are looked at. `test_runs.py` has real runs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from nemo_spin.config.load import from_mapping
from nemo_spin.launch.slurm_script import Places, render
from tests.functional.slurm.cluster import Cluster

NAME = "a \"b' $(touch harm) `touch harm`;#\\x %j"
PLACE = NAME.replace("\\", "")  # with a backslash in its path a log has the name that Slurm gives it
RUN = """\
#!/usr/bin/env bash
echo "$SLURM_JOB_ID ${SLURM_ARRAY_TASK_ID:-} ${*: -1}" >>"$PLACE/starts"
trap 'exit 75' USR1 TERM
while [[ ! -e $PLACE/go ]]; do sleep 0.1; done
exit "$(cat "$PLACE/go")"
"""


@dataclass
class Runs:
    """Scripts of stand-in runs, and what became of them."""

    cluster: Cluster
    place: Path

    def submit(self, *, runs: int = 1, **slurm: object) -> str:
        """Hands a script to sbatch; returns the number of its job."""
        directory = self.place / PLACE / "slurm"
        directory.mkdir(parents=True)
        command = self.place / "run"
        command.write_text(RUN)
        command.chmod(0o755)
        configurations = tuple(directory / f"config-{number}.yaml" for number in range(runs))
        config = from_mapping(
            {
                "name": NAME,
                "trainer": {"num_nodes": 2, "accelerator": "cpu"},
                "launcher": {
                    "name": "slurm",
                    "slurm": {"environment": {"PLACE": str(self.place)}, **slurm},
                },
            }
        )
        places = Places(directory / "job.sh", configurations, self.place, str(command))
        places.script.write_text(render(config, places))
        return self.cluster.ask("sbatch", "--parsable", "--", str(places.script), cwd=self.place)

    def starts(self) -> list[str]:
        """Job, number in the array and configuration of each start of a run."""
        path = self.place / "starts"
        return path.read_text().splitlines() if path.exists() else []

    def jobs(self) -> list[str]:
        """Those that wait or run."""
        return self.cluster.ask("squeue", "--noheader", "--format=%i").split()

    def log(self) -> str:
        return "".join(path.read_text() for path in (self.place / PLACE / "slurm").glob("*.log"))

    def wait(self, condition: Callable[[], object], timeout_s: float = 60) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"{self.cluster.ask('squeue')}\n{self.starts()}\n{self.log()}"
            time.sleep(0.1)

    def end(self, code: int) -> None:
        """Has the runs end, and waits until no job is left."""
        (self.place / "go").write_text(str(code))
        self.wait(lambda: not self.jobs())


@pytest.fixture
def runs(cluster: Cluster, tmp_path: Path) -> Runs:
    return Runs(cluster, tmp_path)


def state(runs: Runs, number: str) -> tuple[str, str]:
    job = runs.cluster.job(number)
    return job["JobState"], job["Restarts"]


@pytest.mark.slow  # as a real run in `test_runs.py`
def test_a_warned_job_goes_back_into_the_queue_and_at_its_end_no_other_waits(runs: Runs) -> None:
    number = runs.submit()
    runs.wait(lambda: len(runs.starts()) == 1 and len(runs.jobs()) == 2)
    assert runs.cluster.ask("squeue", "--noheader", "--format=%j", f"--jobs={number}") == NAME
    runs.cluster.ask("scancel", "--signal=USR1", "--batch", number)  # as Slurm does before the limit
    runs.wait(lambda: len(runs.starts()) == 2)
    assert len(runs.jobs()) == 2, "the one that waits is the one of before"
    runs.end(0)
    assert state(runs, number) == ("COMPLETED", "1")
    assert len(runs.starts()) == 2 and "the run ended with exit code 75" in runs.log()
    assert not list(runs.place.rglob("harm"))


def test_what_is_cut_off_without_a_warning_the_next_job_goes_on_with(runs: Runs) -> None:
    number = runs.submit()
    runs.wait(lambda: len(runs.starts()) == 1 and len(runs.jobs()) == 2)
    (following,) = set(runs.jobs()) - {number}
    runs.cluster.ask("scancel", "--signal=KILL", "--batch", number)
    runs.wait(lambda: len(runs.starts()) == 2)
    assert runs.starts()[1].split()[0] == following
    runs.end(0)
    assert (state(runs, number)[0], state(runs, following)[0]) == ("FAILED", "COMPLETED")


def test_a_cancelled_job_has_no_successor_and_a_failed_one_neither(runs: Runs) -> None:
    number = runs.submit()
    runs.wait(lambda: len(runs.starts()) == 1 and len(runs.jobs()) == 2)
    runs.cluster.ask("scancel", number)
    runs.wait(lambda: not runs.jobs())
    assert state(runs, number) == ("CANCELLED", "0")
    second = runs.cluster.ask(
        "sbatch", "--parsable", "--", str(runs.place / PLACE / "slurm" / "job.sh"), cwd=runs.place
    )
    runs.wait(lambda: len(runs.starts()) == 2 and len(runs.jobs()) == 2)
    runs.end(3)
    assert runs.cluster.job(second)["ExitCode"] == "3:0"
    assert len(runs.starts()) == 2


@pytest.mark.slow
def test_a_job_whose_node_is_lost_starts_again(runs: Runs) -> None:
    number = runs.submit()
    runs.wait(lambda: len(runs.starts()) == 1 and len(runs.jobs()) == 2)
    runs.cluster.kill_node("node1")  # which runs the script
    runs.wait(lambda: runs.cluster.job(number)["JobState"] == "PENDING")
    runs.cluster.revive_node("node1")
    runs.wait(lambda: len(runs.starts()) == 2)
    assert len(runs.jobs()) == 2
    runs.end(0)
    assert state(runs, number) == ("COMPLETED", "1")


@pytest.mark.slow
def test_every_run_of_an_array_goes_on_by_itself(runs: Runs) -> None:
    number = runs.submit(runs=2, options=["--overcommit"])
    runs.wait(lambda: len(runs.starts()) == 2 and len(runs.jobs()) == 4)
    assert sorted(line.split()[1] for line in runs.starts()) == ["0", "1"]
    runs.cluster.ask("scancel", "--signal=USR1", "--batch", f"{number}_1")
    runs.wait(lambda: len(runs.starts()) == 3)
    assert runs.starts()[2].split()[1] == "1" and runs.starts()[2].endswith("config-1.yaml")
    runs.end(0)
    assert len(runs.starts()) == 3


DRIVER = """\
import json, os, sys, time
from pathlib import Path
from nemo_spin.config.load import from_mapping
from nemo_spin.launch.slurm import SlurmLauncher
from nemo_spin.selfplay.launcher import Job

place = Path(sys.argv[1])
config = from_mapping(json.loads(sys.argv[2]))
job = Job(sys.argv[3], "step_body", (), 2, place / "logs", place / "progress.jsonl", 1)
running = SlurmLauncher(config).start(job)
while running.poll() is None:
    if (place / "leave").exists():
        (place / "leave").unlink()
        running.interrupt()
    time.sleep(0.05)
(place / f"{sys.argv[3]}.json").write_text(json.dumps([running.poll(), running.describe_failure()]))
"""

SAMPLER_DRIVER = """\
import json, os, sys, time
from pathlib import Path
from nemo_spin.config.load import from_mapping
from nemo_spin.generation.process import Interpreter, SamplerProcess
from nemo_spin.launch.slurm import SlurmLauncher

place = Path(sys.argv[1])
launcher = SlurmLauncher(from_mapping(json.loads(sys.argv[2])))
process = SamplerProcess(
    Interpreter(sys.executable, os.environ["PYTHONPATH"]),
    request_path=place / "request.json",
    log_path=place / "sampler.log",
    placement=launcher.place_samplers(replicas=2, tensor_parallel_size=1)(1),
    module="step_body",
)
while not (place / "pid.0").exists():
    time.sleep(0.05)
process.kill()
(place / "killed").touch()
time.sleep(60)  # the job goes on
"""


@pytest.fixture
def step(cluster: Cluster, tmp_path: Path) -> Callable[..., str]:
    """Starts a step of two ranks on two nodes inside a job, and returns the job's number."""

    def start(name: str, body: str, driver: str = DRIVER) -> str:
        preamble = "import os, signal, subprocess, sys, time\nfrom pathlib import Path\n"
        preamble += f"rank, here = int(os.environ.get('RANK', '0')), Path({str(tmp_path)!r})\n"
        (tmp_path / "step_body.py").write_text(preamble + textwrap.dedent(body))
        trainer = {"num_nodes": 2, "devices": 1, "accelerator": "cpu"}
        config = {"run_dir": str(tmp_path), "trainer": trainer, "launcher": {"name": "slurm"}}
        words = [sys.executable, "-c", driver, str(tmp_path), json.dumps(config), name]
        script = tmp_path / "step.sh"
        script.write_text('#!/bin/bash\nexport PYTHONPATH="$1:$PYTHONPATH"\nshift\nexec "$@"\n')
        options = ["--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/driver.log", "--no-requeue"]
        return cluster.ask("sbatch", "--parsable", *options, str(script), str(tmp_path), *words, cwd=tmp_path)

    return start


def result(place: Path, name: str) -> tuple[int, str]:
    path = place / f"{name}.json"
    await_file(path)
    time.sleep(0.1)
    code, text = json.loads(path.read_text())
    return code, text


def await_file(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        log = path.parent / "driver.log"
        assert time.monotonic() < end, f"no {path}: {log.read_text() if log.exists() else ''}"
        time.sleep(0.05)


def test_the_ranks_of_a_step_are_on_both_nodes_and_meet(step: Callable[..., str], tmp_path: Path) -> None:
    step(
        "meet",
        """
        import socket
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if rank == 0:
            server = socket.create_server(where)
            server.accept()[0].sendall(b"here")
        else:
            while True:
                try:
                    assert socket.create_connection(where).recv(4) == b"here"
                    break
                except ConnectionRefusedError:
                    time.sleep(0.1)
        print(os.environ["SLURMD_NODENAME"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"])
        """,
    )
    assert result(tmp_path, "meet") == (0, "meet: no rank failed")
    logs = [(tmp_path / "logs" / f"meet.rank_{rank}.log").read_text() for rank in range(2)]
    assert logs == ["node1 2 0\n", "node2 2 0\n"]


def test_a_failure_of_a_step_is_told_with_rank_and_node(step: Callable[..., str], tmp_path: Path) -> None:
    step("fails", "time.sleep(30 * (1 - rank))\nraise ValueError('not finite')")
    code, text = result(tmp_path, "fails")
    assert code == 1
    assert text.startswith("fails: rank 1 on node2 ended with exit code 1 (ValueError: not finite)\n")
    step("dies", "os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(30)")
    code, text = result(tmp_path, "dies")
    assert code == 137
    assert "rank 1 on node2: Killed (often: the machine ran out of memory)" in text


def test_ranks_of_a_step_leave_and_their_children_do_not(step: Callable[..., str], tmp_path: Path) -> None:
    step(
        "leaves",
        """
        child = subprocess.Popen(["sleep", "60"])
        def leave(number, frame):
            time.sleep(0.3 + rank)  # the second is still saving when the first has ended
            ended = child.poll()
            child.kill()
            (here / f"left.{rank}").touch()
            sys.exit(75 if ended is None else 9)
        signal.signal(signal.SIGTERM, leave)
        (here / f"ready.{rank}").touch()
        time.sleep(60)
        """,
    )
    for rank in range(2):
        await_file(tmp_path / f"ready.{rank}")
    (tmp_path / "leave").touch()
    code, text = result(tmp_path, "leaves")
    assert code == 75, text
    assert all((tmp_path / f"left.{rank}").exists() for rank in range(2))


def test_ranks_do_not_outlive_the_command_that_started_them(step: Callable[..., str], tmp_path: Path) -> None:
    """It is killed; the batch script that it replaced ends with it, but srun is told at once."""
    step("orphans", "(here / f'pid.{rank}').write_text(str(os.getpid()))\ntime.sleep(60)")
    for rank in range(2):
        await_file(tmp_path / f"pid.{rank}")
    time.sleep(0.2)
    pids = [(tmp_path / f"pid.{rank}").read_text() for rank in range(2)]
    (driver,) = [
        entry.name
        for entry in Path("/proc").glob("[0-9]*")
        if DRIVER[:60].encode() in _command_line(entry) and b"-c" in _command_line(entry).split(b"\0")[:2]
    ]
    os.kill(int(driver), signal.SIGKILL)
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end, "ranks live on"
        time.sleep(0.05)


def test_a_sampler_that_is_killed_on_another_node_is_gone(
    cluster: Cluster, step: Callable[..., str], tmp_path: Path
) -> None:
    """srun, killed at once, would leave it alive: its GPUs are needed for the one that follows."""
    body = "(here / 'node').write_text(os.environ['SLURMD_NODENAME'])\n"
    body += "(here / 'pid.partial').write_text(str(os.getpid()))\n"
    body += "(here / 'pid.partial').rename(here / 'pid.0')\ntime.sleep(60)"
    number = step("sampler", body, SAMPLER_DRIVER)
    await_file(tmp_path / "killed")
    assert (tmp_path / "node").read_text() == "node2"
    assert not Path(f"/proc/{(tmp_path / 'pid.0').read_text()}").exists()
    assert cluster.job(number)["JobState"] == "RUNNING"
    cluster.ask("scancel", "--full", number)


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""
