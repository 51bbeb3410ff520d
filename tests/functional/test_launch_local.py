"""The local launcher with real processes: who failed first, who is ended, who survives whom."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_spin.errors import DataError
from nemo_spin.launch.local import LocalLauncher
from nemo_spin.selfplay.launcher import Job, RunningJob

MakeJob = Callable[..., Job]


@pytest.fixture
def make_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeJob:
    """Writes a module and describes the job that runs it in every rank."""
    modules = tmp_path / "modules"
    modules.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(modules), prepend=os.pathsep)

    def make(body: str, *arguments: str, ranks: int = 2) -> Job:
        preamble = (
            "import os, signal, sys, time\nfrom pathlib import Path\nrank = int(os.environ.get('RANK', -1))\n"
        )
        (modules / "stage_body.py").write_text(preamble + textwrap.dedent(body))
        return Job(
            name="train iteration 0",
            module="stage_body",
            arguments=arguments,
            ranks=ranks,
            log_dir=tmp_path / "logs",
            progress_path=tmp_path / "progress.jsonl",
            omp_num_threads=3,
        )

    return make


def wait(running: RunningJob, timeout_s: float = 30.0) -> int:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        code = running.poll()
        if code is not None:
            return code
        time.sleep(0.02)
    running.stop()
    raise AssertionError(f"the job did not end within {timeout_s} s: {running.describe_failure()}")


def await_file(path: Path, timeout_s: float = 30.0) -> str:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.02)
    raise AssertionError(f"{path} was not written within {timeout_s} s")


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def await_death(pids: list[int], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still alive: {[pid for pid in pids if is_alive(pid)]}"
        time.sleep(0.02)


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "sys.exit()"])
def test_a_rank_that_ended_well_does_what_is_left_and_is_not_taken_apart(make_job: MakeJob, end: str) -> None:
    job = make_job(
        f"""
        import atexit
        class Large:
            def __del__(self):
                print("taken apart")
        large = Large()
        atexit.register(print, "the last rows")
        print("done")
        {end}
        """
    )
    assert wait(LocalLauncher().start(job)) == 0
    assert (job.log_dir / "train-iteration-0.rank_0.log").read_text() == "done\nthe last rows\n"


def test_every_rank_gets_its_place_its_arguments_and_its_log(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(
        """
        import json
        keys = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS".split()
        print(json.dumps({key: os.environ[key] for key in keys}), sys.argv[1:], __name__)
        print("to stderr", file=sys.stderr)
        Path(os.environ["NEMO_SPIN_PROGRESS"] + f".{rank}").touch()
        """,
        "train",
        "--run-dir",
        "a b",
        ranks=3,
    )
    assert wait(LocalLauncher().start(job)) == 0
    environments = []
    for rank in range(3):
        line, error = (job.log_dir / f"train-iteration-0.rank_{rank}.log").read_text().splitlines()
        assert line.endswith("['train', '--run-dir', 'a b'] __main__")
        assert error == "to stderr"
        environments.append(json.loads(line[: line.index("}") + 1]))
        assert (tmp_path / f"progress.jsonl.{rank}").exists()
    assert [entry["RANK"] for entry in environments] == ["0", "1", "2"]
    assert [entry["LOCAL_RANK"] for entry in environments] == ["0", "1", "2"]
    assert {entry["WORLD_SIZE"] for entry in environments} == {"3"}
    assert {entry["OMP_NUM_THREADS"] for entry in environments} == {"3"}
    assert len({(entry["MASTER_ADDR"], entry["MASTER_PORT"]) for entry in environments}) == 1
    assert not list(job.log_dir.glob("*.failure.json*"))


def test_ranks_meet_over_gloo_at_the_reserved_port(make_job: MakeJob) -> None:
    job = make_job(
        """
        import torch
        from torch import distributed
        distributed.init_process_group("gloo")
        total = torch.tensor([rank + 1.0])
        distributed.all_reduce(total)
        assert total.item() == 3.0
        distributed.destroy_process_group()
        """
    )
    running = LocalLauncher().start(job)
    assert wait(running, timeout_s=120) == 0, running.describe_failure()


def test_ranks_can_spawn_helpers_from_their_own_module(make_job: MakeJob) -> None:
    job = make_job(
        """
        import multiprocessing
        def square(number):
            return number**2
        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                assert pool.map(square, [2, 3]) == [4, 9]
        """,
        ranks=1,
    )
    running = LocalLauncher().start(job)
    assert wait(running) == 0, running.describe_failure()


def test_the_first_failing_rank_is_shown_and_the_others_are_ended(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(
        """
        Path(sys.argv[1], f"{rank}.pid").write_text(str(os.getpid()))
        while len(list(Path(sys.argv[1]).glob("*.pid"))) < 3:
            time.sleep(0.01)
        if rank == 1:
            raise ValueError("the loss is not finite")
        time.sleep(600)
        """,
        str(tmp_path),
        ranks=3,
    )
    running = LocalLauncher().start(job)
    await_file(tmp_path / "1.pid")
    started = time.monotonic()
    assert wait(running) == 1
    assert time.monotonic() - started < 5
    message = running.describe_failure()
    log = job.log_dir / "train-iteration-0.rank_1.log"
    assert message.startswith(
        "train iteration 0: rank 1 ended with exit code 1 (ValueError: the loss is not finite)"
    )
    assert "  | ValueError: the loss is not finite\n" in message
    assert message.endswith(f"log: {log}")
    assert not any(is_alive(int((tmp_path / f"{rank}.pid").read_text())) for rank in range(3))


def test_the_first_failure_counts_even_where_its_process_ends_last(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(
        """
        import atexit
        if rank == 1:
            atexit.register(time.sleep, 0.6)
            Path(sys.argv[1]).touch()
            raise ValueError("first")
        while not Path(sys.argv[1]).exists():
            time.sleep(0.01)
        time.sleep(0.2)
        sys.exit(7)
        """,
        str(tmp_path / "failed"),
    )
    running = LocalLauncher().start(job)
    assert wait(running) == 1
    assert "rank 1 ended with exit code 1 (ValueError: first)" in running.describe_failure()


def test_a_typed_exit_code_passes_through(make_job: MakeJob) -> None:
    running = LocalLauncher().start(make_job("sys.exit(2 if rank == 0 else 0)"))
    assert wait(running) == 2
    assert "rank 0 ended with exit code 2" in running.describe_failure()


def test_a_killed_rank_ends_the_job(make_job: MakeJob) -> None:
    running = LocalLauncher().start(
        make_job("if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\nelse: time.sleep(600)")
    )
    assert wait(running) == 128 + signal.SIGKILL
    assert "rank 1 was killed by SIGKILL (often: the machine ran out of memory)" in running.describe_failure()


def test_an_abort_is_told_unless_the_rank_had_failed_before(make_job: MakeJob) -> None:
    """Python fails first, then a library that is taken apart aborts; or there is the abort alone."""
    body = "if rank: time.sleep(60)\nimport atexit\natexit.register(os.abort)\n{}"
    for failure, told in (
        ("raise ValueError('not finite')", "rank 0 failed (ValueError: not finite)"),
        ("os.abort()", "rank 0 was ended by SIGABRT"),
    ):
        running = LocalLauncher().start(make_job(body.format(failure)))
        assert wait(running) == 128 + signal.SIGABRT
        assert running.describe_failure().startswith(f"train iteration 0: {told}\n")


def test_stop_ends_ranks_that_ignore_sigterm_and_their_children(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(
        """
        import subprocess
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen(["sleep", "600"])
        Path(sys.argv[1], f"{rank}.pids").write_text(f"{os.getpid()} {child.pid}")
        time.sleep(600)
        """,
        str(tmp_path),
    )
    running = LocalLauncher().start(job)
    pids = [int(pid) for rank in range(2) for pid in await_file(tmp_path / f"{rank}.pids").split()]
    assert len(pids) == 4 and all(is_alive(pid) for pid in pids)
    started = time.monotonic()
    running.stop()
    assert time.monotonic() - started < 8
    await_death(pids, timeout_s=1)
    assert running.poll() == 128 + signal.SIGTERM
    running.stop()  # harmless


def test_ranks_are_asked_to_leave_and_end_one_by_one(make_job: MakeJob, tmp_path: Path) -> None:
    """The rank that saves longer than failing ranks are given; its child is not asked."""
    job = make_job(
        """
        import subprocess
        def leave(number, frame):
            time.sleep(1.5 * rank)
            sys.exit(75 if child.poll() is None else "the child was asked too")
        child = subprocess.Popen(["sleep", "60"])
        signal.signal(signal.SIGTERM, leave)
        Path(sys.argv[1], f"{rank}.pid").write_text(str(os.getpid()))
        time.sleep(60)
        """,
        str(tmp_path),
    )
    running = LocalLauncher().start(job)
    for rank in range(2):
        await_file(tmp_path / f"{rank}.pid")
    running.interrupt()
    assert wait(running) == 75, running.describe_failure()
    notes = [json.loads(path.read_text()) for path in job.log_dir.glob("*.failure.json")]
    assert [note["message"] for note in notes] == ["75", "75"]


def test_children_left_behind_by_finished_ranks_are_ended(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(
        """
        import subprocess
        child = subprocess.Popen(["sleep", "600"])
        Path(sys.argv[1], f"{rank}.pid").write_text(str(child.pid))
        """,
        str(tmp_path),
    )
    assert wait(LocalLauncher().start(job)) == 0
    await_death([int((tmp_path / f"{rank}.pid").read_text()) for rank in range(2)])


def test_logs_are_kept_over_attempts_and_only_the_last_is_shown(make_job: MakeJob) -> None:
    for attempt in ("first", "second"):
        running = LocalLauncher().start(make_job(f"print('{attempt}'); sys.exit(3)", ranks=1))
        assert wait(running) == 3
    message = running.describe_failure()
    assert "| second" in message and "| first" not in message
    assert (make_job("").log_dir / "train-iteration-0.rank_0.log").read_text() == "first\nsecond\n"


def test_a_module_that_is_not_there_is_said(make_job: MakeJob) -> None:
    job = make_job("", ranks=1)
    running = LocalLauncher().start(Job(**{**vars(job), "module": "no_such_module"}))
    assert wait(running) == 1
    assert "No module named no_such_module" in running.describe_failure()


def test_a_log_directory_that_cannot_be_made_is_a_typed_error(make_job: MakeJob, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    job = Job(**{**vars(make_job("")), "log_dir": tmp_path / "file" / "logs"})
    with pytest.raises(DataError, match="could not be started"):
        LocalLauncher().start(job)


def guards_of(group: int) -> list[int]:
    """The shells that watch over a group, while they are alive."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,pgid=,stat=,comm="], capture_output=True, text=True)
    rows = [line.split() for line in listed.stdout.splitlines()]
    return [
        int(pid) for pid, pgid, state, name in rows if int(pgid) == group and name == "sh" and state[0] != "Z"
    ]


_PARENT = """
import sys, time
from pathlib import Path
from nemo_spin.launch.local import LocalLauncher
from nemo_spin.selfplay.launcher import Job

place = Path(sys.argv[1])
running = LocalLauncher().start(
    Job(
        name="train", module="stage_body", arguments=(str(place),), ranks=2, log_dir=place / "logs",
        progress_path=place / "progress.jsonl", omp_num_threads=1,
    )
)
while running.poll() is None:
    time.sleep(0.05)
"""


@pytest.mark.parametrize("victim", ["parent", "guard and parent", "guards, later parent"])
def test_ranks_and_their_children_die_with_a_killed_parent(
    make_job: MakeJob, tmp_path: Path, victim: str
) -> None:
    make_job(
        """
        import subprocess
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen(["sleep", "600"])
        Path(sys.argv[1], f"{rank}.pids").write_text(f"{os.getpid()} {child.pid} {os.getpgid(0)}")
        time.sleep(600)
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, str(tmp_path)])
    try:
        pids = [[int(pid) for pid in await_file(tmp_path / f"{rank}.pids").split()] for rank in range(2)]
        ranks, children, guard = [entry[0] for entry in pids], [entry[1] for entry in pids], pids[0][2]
        assert all(is_alive(pid) for pid in [*ranks, *children, guard])
        if victim == "parent":
            parent.kill()
            await_death([*ranks, *children, guard], timeout_s=5)
        elif victim == "guards, later parent":
            for _ in range(2):
                for pid in guards_of(guard):
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.5)
            parent.kill()
            await_death([*ranks, *children, *guards_of(guard)], timeout_s=5)
        else:  # the kernel alone looks after the ranks
            os.kill(guard, signal.SIGKILL)
            parent.kill()
            await_death(ranks, timeout_s=5)
            for child in children:
                os.kill(child, signal.SIGKILL)
    finally:
        parent.kill()
        parent.wait()
