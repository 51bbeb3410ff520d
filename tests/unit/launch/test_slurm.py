"""Ranks as a step of Slurm's. `srun` is a stand-in here, which starts its tasks on this machine.

The real one starts them in `tests/functional/slurm`.
"""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import pytest

from nemo_spin.config.load import from_mapping
from nemo_spin.config.schema import Config
from nemo_spin.errors import ConfigError, StageError
from nemo_spin.launch.placement import of_a_step, of_environment
from nemo_spin.launch.slurm import SlurmLauncher, step_command
from nemo_spin.selfplay.faults import worth_another_try
from nemo_spin.selfplay.launcher import Job, RankJob

ALLOCATION = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2"}
SRUN = f"""#!{sys.executable} -IS
import os, signal, subprocess, sys
options = [word for word in sys.argv[1:] if word.startswith("--")]
command = sys.argv[1 + len(options):]
given = dict(word[2:].split("=", 1) for word in options if "=" in word)
tasks = []
def forward(number, frame):
    for task in tasks:
        if task.poll() is None:
            task.send_signal(signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGKILL)
    if number == signal.SIGTERM:
        for task in tasks:
            task.wait()
        sys.exit(137)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, forward)
for rank in range(int(given["ntasks"])):
    place = dict(SLURM_PROCID=str(rank), SLURM_NTASKS=given["ntasks"], SLURM_LOCALID="0")
    place |= dict(SLURM_NODEID=str(rank), SLURMD_NODENAME=f"node{{rank + 1}}")
    place |= dict(SLURM_STEP_TASKS_PER_NODE="1(x2)", SLURM_LAUNCH_NODE_IPADDR="127.0.0.1")
    tasks.append(subprocess.Popen(command, env=os.environ | place))
left = set(range(len(tasks)))
code = 0
while left:
    pid, status = os.wait()
    (rank,) = [rank for rank in left if tasks[rank].pid == pid]
    left.remove(rank)
    tasks[rank].returncode = ended = os.waitstatus_to_exitcode(status)
    if ended and not code:
        how = dict([(-6, "Aborted"), (-9, "Killed")]).get(ended) or f"Exited with exit code {{ended}}"
        print(f"srun: error: node{{rank + 1}}: task {{rank}}: {{how}}", file=sys.stderr)
        print("srun: launch/slurm: _step_signal: Terminating StepId=1.0", file=sys.stderr)
        code = 137 if ended < 0 else ended
        for other in left:
            tasks[other].kill()
sys.exit(code)
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Starts two ranks, on as many nodes, that run a body of Python."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text(SRUN)
    (tmp_path / "bin" / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    for name, value in ALLOCATION.items():
        monkeypatch.setenv(name, value)
    started: list[RankJob] = []

    def starter(body: str) -> RankJob:
        preamble = "import os, signal, sys, time\nfrom pathlib import Path\nrank = int(os.environ['RANK'])\n"
        preamble += f"here = Path({str(tmp_path)!r})\n"
        (tmp_path / "step_body.py").write_text(preamble + textwrap.dedent(body))
        job = Job(
            name="train of iteration 0",
            module="step_body",
            arguments=("a b",),
            ranks=2,
            log_dir=tmp_path / "logs",
            progress_path=tmp_path / "progress.jsonl",
            omp_num_threads=1,
        )
        started.append(SlurmLauncher(configured(tmp_path)).start(job))
        return started[-1]

    yield starter
    for job in started:
        job.stop()


def configured(run_dir: Path, **slurm: object) -> Config:
    return from_mapping(
        {
            "run_dir": str(run_dir),
            "trainer": {"num_nodes": 2, "devices": 1, "accelerator": "cpu"},
            "launcher": {"name": "slurm", "slurm": slurm, "join_timeout_s": 5.0},
        }
    )


def wait(job: RankJob) -> int:
    end = time.monotonic() + 30
    while (code := job.poll()) is None:
        assert time.monotonic() < end, "it does not end"
        time.sleep(0.02)
    return code


def await_file(path: Path) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.01)


def test_ranks_find_their_place_their_log_and_each_other(start, tmp_path: Path) -> None:
    job = start(
        """
        print(*[os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")])
        print(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], sys.argv[1:], __name__)
        """
    )
    assert wait(job) == 0, job.describe_failure()
    logs = [(tmp_path / "logs" / f"train-of-iteration-0.rank_{rank}.log").read_text() for rank in range(2)]
    first, second = (log.splitlines() for log in logs)
    assert (first[0], second[0]) == ("0 2 0 1", "1 2 0 1")
    assert first[1] == second[1] and first[1].startswith("127.0.0.1 ")
    assert first[1].endswith("['a b'] __main__")


def test_the_first_failure_is_named_with_its_node(start) -> None:
    job = start("time.sleep(30 * (1 - rank))\nraise ValueError('not finite')")
    assert wait(job) == 1
    message = job.describe_failure()
    assert message.startswith(
        "train of iteration 0: rank 1 on node2 ended with exit code 1 (ValueError: not finite)\n"
    )
    assert "  | ValueError: not finite\n" in message and message.endswith("rank_1.log")


def test_a_rank_that_dies_without_a_word_comes_before_those_that_complain(start) -> None:
    job = start(
        """
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5)
        raise ConnectionError("closed by peer")
        """
    )
    assert wait(job) == 137
    assert "rank 1 on node2: Killed (often: the machine ran out of memory)" in job.describe_failure()


def test_of_a_rank_that_aborts_the_reason_is_told(start) -> None:
    """As NCCL's watchdog ends a process: the reason, frames of C++, and the threads of Python."""
    job = start(
        """
        if rank == 0:
            time.sleep(60)
        print("[rank1]:[E1122 02:14:07.1 ProcessGroupNCCL.cpp:632] [Rank 1] Watchdog caught collective "
              "operation timeout: WorkNCCL(SeqNum=9) ran for 600013 milliseconds before timing out.")
        for number in range(30):
            print(f"frame #{number}: clone + 0x44 (0x7fd2c178ba04 in libc.so.6)")
        os.abort()
        """
    )
    wait(job)
    message = job.describe_failure()
    assert "rank 1 on node2: Aborted\n  | [rank1]:[E1122 02:14:07.1 " in message
    assert "before timing out.\n  | …\n" in message
    assert worth_another_try(StageError(message)) == "a collective hung"


def test_a_clock_that_is_an_hour_ahead_does_not_hide_the_first_failure(start) -> None:
    job = start(
        """
        import atexit
        if rank == 0:
            atexit.register(time.sleep, 30)  # it complains about rank 1, and is slow to end
            raise ConnectionError("closed by peer")
        while not list(here.glob("logs/*.rank_0.failure.json")):
            time.sleep(0.01)
        clock = time.time
        time.time = lambda: clock() + 3600
        raise ValueError("not finite")
        """
    )
    assert wait(job) == 1
    assert "rank 1 on node2 ended with exit code 1 (ValueError: not finite)" in job.describe_failure()


def test_ranks_are_asked_to_leave_and_their_children_are_not(start, tmp_path: Path) -> None:
    job = start(
        """
        import subprocess
        child = subprocess.Popen(["sleep", "60"])
        def leave(number, frame):
            os.kill(child.pid, signal.SIGUSR1)  # as Slurm does to every process of a step
            time.sleep(0.2 + rank)
            ended = child.poll()
            child.kill()
            sys.exit(75 if ended is None else "the child was asked, too")
        signal.signal(signal.SIGTERM, leave)
        (here / f"ready.{rank}").touch()
        time.sleep(60)
        """
    )
    for rank in range(2):
        await_file(tmp_path / f"ready.{rank}")
    job.interrupt()
    assert wait(job) == 75, job.describe_failure()


def test_stopped_ranks_are_gone_and_blamed_for_nothing(start, tmp_path: Path) -> None:
    job = start("(here / f'pid.{rank}').write_text(str(os.getpid()))\ntime.sleep(60)")
    for rank in range(2):
        await_file(tmp_path / f"pid.{rank}")
    time.sleep(0.1)
    job.stop()
    assert job.poll() == 128 + signal.SIGTERM
    assert not any(Path(f"/proc/{(tmp_path / f'pid.{rank}').read_text()}").exists() for rank in range(2))


def test_outside_of_an_allocation_or_in_one_that_is_too_small_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no SLURM_JOB_ID in the environment"):
        SlurmLauncher(configured(tmp_path), {})
    with pytest.raises(ConfigError, match="2, in an allocation of 1"):
        SlurmLauncher(configured(tmp_path), {**ALLOCATION, "SLURM_JOB_NUM_NODES": "1"})


def test_a_container_is_named_as_its_runtime_wants_it(tmp_path: Path) -> None:
    def command(**slurm: object) -> list[str]:
        slurm = {"environment": {"A": 1, "B": "2"}, "container_mounts": ["/a b:/c"], **slurm}
        config = configured(tmp_path, container_image="i", **slurm)
        config.trainer.accelerator = "gpu"
        return step_command(config, ["python", "-V"], nodes=2, tasks_per_node=1)

    assert command(cpus_per_task=7)[-7:] == [
        "--gpus-per-node=1",
        "--cpus-per-task=7",
        "--container-image=i",
        f"--container-mounts={tmp_path}:{tmp_path},/a b:/c",
        "--container-env=A,B,OMP_NUM_THREADS",
        "python",
        "-V",
    ]
    binds = ["--bind", f"{tmp_path}:{tmp_path}", "--bind", "/a b:/c"]
    assert command(container_runtime="apptainer")[-9:] == ["exec", "--nv", *binds, "i", "python", "-V"]


def test_samplers_are_spread_over_nodes_and_have_gpus_of_their_own(tmp_path: Path) -> None:
    config = configured(tmp_path)
    config.trainer.accelerator, config.trainer.devices = "gpu", 4
    launcher = SlurmLauncher(config, ALLOCATION)
    place = launcher.place_samplers(replicas=3, tensor_parallel_size=2)
    placements = [place(index) for index in range(3)]
    assert [placement.prefix[-2:] for placement in placements] == [
        ("env", "CUDA_VISIBLE_DEVICES=0,1"),
        ("env", "CUDA_VISIBLE_DEVICES=0,1"),
        ("env", "CUDA_VISIBLE_DEVICES=2,3"),
    ]
    nodes = [word for placement in placements for word in placement.prefix if "relative" in word]
    assert nodes == ["--relative=0", "--relative=1", "--relative=0"]
    assert [placement.neighbours for placement in placements] == [2, 1, 2]
    assert not any(placement.is_child for placement in placements)
    with pytest.raises(ConfigError, match="set it to 4 at most"):
        launcher.place_samplers(replicas=5, tensor_parallel_size=2)


def test_the_place_of_a_rank_is_what_its_starter_says() -> None:
    step = {"SLURM_PROCID": "5", "SLURM_NTASKS": "7", "SLURM_LOCALID": "1", "SLURM_NODEID": "2"}
    place = of_a_step({**step, "SLURM_STEP_TASKS_PER_NODE": "2(x3),1"})
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (5, 7, 1, 2)
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert of_environment({**step, **torchrun}).rank == 1
    mpirun = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    assert of_environment(mpirun).local_world_size == 2
    assert of_environment(step).rank == 5
    with pytest.raises(ConfigError, match="somebody else starts this command once for each rank"):
        of_environment({})
