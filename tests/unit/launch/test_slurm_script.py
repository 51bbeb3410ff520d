"""The batch script, run by a real bash; Slurm's commands are stand-ins that record their arguments.

The real ones run it in `tests/functional/slurm`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_spin.config.load import from_mapping
from nemo_spin.config.schema import Config
from nemo_spin.launch.slurm_script import Places, quote_for_sbatch, render

HOSTILE = "a b'c\"d $(touch harm) `touch harm` ; touch harm # \\ %j\n#SBATCH --wrap=x\ntouch harm"
LINE = HOSTILE.partition("\n")[0]  # without line breaks, which the rules refuse in most places
STAND_IN = f"""#!{sys.executable} -IS
import json, os, sys, time
name = os.path.basename(sys.argv[0])
with open(os.environ["RECORD"], "a") as record:
    record.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
if name == "sbatch":
    print("17;cluster")
if name == "scontrol" and os.environ.get("REQUEUE") == "refused":
    sys.exit(1)
if name == "python":
    with open(os.environ["RECORD"] + ".run", "w") as record:
        record.write(json.dumps([os.getcwd(), os.environ.get("VARIABLE")]))
    if os.environ.get("WAITS"):
        import signal
        if not os.environ.get("DIES"):
            signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        open(os.environ["WAITS"], "w").close()
        time.sleep(60)
    sys.exit(int(os.environ.get("CODE", "0")))
"""


def configured(**slurm: object) -> Config:
    return from_mapping(
        {
            "name": "tiny",
            "run_dir": "runs/x",
            "trainer": {"num_nodes": 2, "devices": 4},
            "launcher": {"name": "slurm", "slurm": slurm},
        }
    )


class Machine:
    """A directory with stand-ins, and scripts that run there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.record = directory / "record"
        self.work = directory / HOSTILE
        self.work.mkdir()
        commands = directory / "bin"
        commands.mkdir()
        for name in ("sbatch", "scontrol", "scancel", "module", "sleep", "python"):
            path = commands / name
            path.write_text(STAND_IN)
            path.chmod(0o755)
        self.environment = {
            "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
            "RECORD": str(self.record),
            "SLURM_JOB_ID": "16",
        }
        self.places = Places(
            script=self.work / "slurm" / "job.sh",
            configurations=(self.work / "config.yaml",),
            working_directory=self.work,
            python=str(commands / "python"),
        )

    def start(
        self, config: Config, places: Places | None = None, **environment: str
    ) -> subprocess.Popen[str]:
        places = places or self.places
        places.script.parent.mkdir(exist_ok=True)
        places.script.write_text(render(config, places))
        return subprocess.Popen(
            ["bash", str(places.script)],
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, config: Config, places: Places | None = None, **environment: str) -> int:
        process = self.start(config, places, **environment)
        _, errors = process.communicate(timeout=30)
        assert not errors
        return process.returncode

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in self.record.read_text().splitlines()]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_what_it_asks_for_stands_at_its_head(machine: Machine) -> None:
    config = configured(
        account="lab",
        partition="gpu,big",
        qos="high",
        constraint="[a|b]",
        time="1-12",
        options=["--exclusive"],
    )
    text = render(config, machine.places)
    directives = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert directives == [
        "--job-name=tiny",
        "--account=lab",
        "--partition=gpu,big",
        "--qos=high",
        '--constraint="[a|b]"',
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--time=1-12",
        "--signal=B:USR1@300",
        "--open-mode=append",
        "--requeue",
        "--exclusive",
    ], "the log has no line of its own: a line break in its path cannot be written there"
    plain = Places(Path("/r/50%/slurm/job.sh"), (Path("/r/c.yaml"),), Path("/"), "python")
    assert "#SBATCH --output=/r/50%%/slurm/%j.log\n" in render(config, plain)
    config.trainer.accelerator = "cpu"
    assert "gpus" not in render(config, plain)


def test_values_are_quoted_for_sbatch() -> None:
    """As a real sbatch reads them: `tests/functional/slurm` submits such a name."""
    assert quote_for_sbatch("04:00:00") == "04:00:00"
    assert quote_for_sbatch('a "b" \\c') == '"a \\"b\\" \\\\c"'


def test_no_value_breaks_out(machine: Machine) -> None:
    config = configured(
        job_name=HOSTILE,
        account=LINE,
        modules=[LINE],
        environment={"VARIABLE": HOSTILE, "NUMBER": 1},
        options=[f"--comment={LINE}"],
    )
    assert machine.run(config) == 0
    assert not list(machine.directory.rglob("harm"))
    program = machine.places.configurations[0]
    assert machine.calls() == [
        ["module", "load", "--", LINE],
        [
            "sbatch",
            "--parsable",
            "--dependency=afternotok:16",
            "--kill-on-invalid-dep=yes",
            "--",
            str(machine.places.script),
        ],
        ["python", "-m", "nemo_spin.cli", "run", "--config", str(program)],
        ["scancel", "17"],
    ]
    assert json.loads(Path(f"{machine.record}.run").read_text()) == [str(machine.work), HOSTILE]
    lines = machine.places.script.read_text().splitlines()
    assert [line for line in lines if line.startswith("#SBATCH")] == lines[2:11]
    assert not any(line.startswith("#SBATCH --wrap") for line in lines)


@pytest.mark.parametrize(
    ("code", "requeue", "called"),
    [
        (0, "works", ["scancel"]),
        (1, "works", ["scancel"]),
        (3, "works", ["scancel"]),
        (75, "works", ["scontrol", "sleep"]),
        (75, "refused", ["scontrol"]),
        (76, "works", ["scontrol", "sleep"]),
        (76, "refused", ["scontrol"]),
    ],
)
def test_what_follows_from_the_exit_code(
    machine: Machine, code: int, requeue: str, called: list[str]
) -> None:
    assert machine.run(configured(), CODE=str(code), REQUEUE=requeue) == code
    assert [call[0] for call in machine.calls()] == ["sbatch", "python", *called]
    if code in (75, 76):
        assert machine.calls()[2] == ["scontrol", "requeue", "16"]
        machine.record.unlink()
        assert machine.run(configured(), CODE="0") == 0  # put back into the queue, it has a successor
        assert [call[0] for call in machine.calls()] == ["python", "scancel"]


def test_the_termination_that_puts_it_back_into_the_queue_is_no_cancellation(machine: Machine) -> None:
    """Slurm ends the script of a job that is requeued: what waits for it is to go on waiting."""
    (machine.directory / "bin" / "sleep").write_text('#!/bin/bash\nkill -TERM "$PPID"\n')
    assert machine.run(configured(), CODE="76") == 76
    assert [call[0] for call in machine.calls()] == ["sbatch", "python", "scontrol"]


def test_without_requeue_what_failed_for_now_leaves_its_successor_waiting(machine: Machine) -> None:
    assert machine.run(configured(requeue=False), CODE="76") == 76
    assert [call[0] for call in machine.calls()] == ["sbatch", "python"]


def test_without_requeue_and_continuation_it_only_runs(machine: Machine) -> None:
    config = configured(requeue=False, continuation=False)
    assert machine.run(config, CODE="75") == 75
    assert [call[0] for call in machine.calls()] == ["python"]
    assert "#SBATCH --no-requeue" in machine.places.script.read_text()


@pytest.mark.parametrize(
    ("number", "called"),
    [(signal.SIGUSR1, ["scontrol", "sleep"]), (signal.SIGTERM, ["scancel", "scancel"])],
)
def test_a_warning_goes_on_and_a_cancellation_does_not(
    machine: Machine, number: signal.Signals, called: list[str]
) -> None:
    started = machine.directory / "started"
    process = machine.start(configured(), WAITS=str(started))
    while not started.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert [call[0] for call in machine.calls()][2:] == called[: len(machine.calls()) - 2]
    assert machine.calls()[2][0] == called[0]


def test_a_run_that_dies_of_the_warning_goes_on_as_well(machine: Machine) -> None:
    started = machine.directory / "started"
    process = machine.start(configured(), WAITS=str(started), DIES="1")
    while not started.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert [call[0] for call in machine.calls()][2:] == ["scontrol", "sleep"]


def test_an_array_has_a_run_for_each_number(machine: Machine) -> None:
    paths = tuple(machine.work / name / "config.yaml" for name in ("000-a", "001-b"))
    places = Places(machine.places.script, paths, machine.work, machine.places.python)
    array = {"SLURM_ARRAY_JOB_ID": "15", "SLURM_ARRAY_TASK_ID": "1"}
    assert machine.run(configured(), places, CODE="75", **array) == 75
    assert "#SBATCH --array=0-1\n" in places.script.read_text()
    submitted, ran, requeued, _ = machine.calls()
    assert submitted[2:5] == ["--dependency=afternotok:15_1", "--kill-on-invalid-dep=yes", "--array=1"]
    assert ran[-1] == str(paths[1])
    assert requeued == ["scontrol", "requeue", "15_1"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck (apt: shellcheck)")
def test_shellcheck_finds_nothing(machine: Machine) -> None:
    hostile = {"job_name": HOSTILE, "modules": [LINE], "environment": {"A": HOSTILE}}
    configs = [
        configured(**hostile),
        configured(requeue=False, continuation=False),
        configured(continuation=False),
    ]
    arrays = Places(machine.places.script, (Path("/a $b"), Path("/c")), machine.work, "python")
    for places in (machine.places, arrays):
        for number, config in enumerate(configs):
            path = machine.directory / f"{number}.sh"
            path.write_text(render(config, places))
            assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
            found = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True, check=False)
            assert found.returncode == 0, found.stdout
