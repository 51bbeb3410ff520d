"""Ranks as a step of the Slurm job that this process runs in.

Each stage is one `srun`, over as many nodes of the allocation as `trainer.num_nodes` says, one
task for each rank. `launch/rank.py` finds out in each task which rank it is, and writes log and
failure where the local launcher would: the run directory is on storage that all nodes share.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_spin.config.schema import Config, SlurmConfig
from nemo_spin.errors import PREEMPTED, ConfigError, DataError, explain
from nemo_spin.generation.placement import Place, Placement
from nemo_spin.launch.local import PROGRESS_VARIABLE, inherited_environment, read_note
from nemo_spin.launch.log_tail import last_lines, quoted_end
from nemo_spin.launch.rank import JOIN_VARIABLE, STEP_VARIABLE, step_files
from nemo_spin.launch.slurm_script import gpus_per_node
from nemo_spin.launch.tied import tied
from nemo_spin.selfplay.launcher import Job, RankJob

_TERM_S = 60.0  # srun waits for its step to end (KillWait, often 30 s) before it does itself
_SAID = re.compile(r"error: (?P<node>[^\s:]+): tasks? (?P<ranks>[\d,-]+): (?P<how>.+)")
_ABORTED = re.compile(r": Aborted\b")  # strsignal(SIGABRT)
_ENDED_BY_SRUN = re.compile(r"Terminating StepId|CANCELLED AT")


class SlurmLauncher:
    """Starts all ranks of a job as one step.

    Args:
        config: The configuration.
        environment: Of this process.

    Raises:
        ConfigError: This process is in no allocation, or in one that is too small.
    """

    def __init__(self, config: Config, environment: Mapping[str, str] | None = None) -> None:
        self._config = config
        environment = os.environ if environment is None else environment
        nodes = environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES")
        if "SLURM_JOB_ID" not in environment or nodes is None:
            raise ConfigError(
                explain(
                    "launcher.name=slurm",
                    found="no SLURM_JOB_ID in the environment",
                    rule="ranks are steps of a Slurm job: the command runs inside an allocation",
                    remedy="submit it with `nemo-spin slurm --submit`, start it in `salloc`, "
                    "or use launcher=local",
                )
            )
        if int(nodes) < config.trainer.num_nodes:
            raise ConfigError(
                explain(
                    "trainer.num_nodes",
                    found=f"{config.trainer.num_nodes}, in an allocation of {nodes}",
                    rule="every node of a training is one of the allocation",
                    remedy="ask Slurm for more nodes, or lower trainer.num_nodes and the parallel sizes",
                )
            )

    def start(self, job: Job) -> RankJob:
        """Starts the step and returns at once.

        Raises:
            DataError: A process or log file could not be made.
        """
        try:
            return SlurmJob(job, self._config)
        except OSError as error:
            raise DataError(
                explain(
                    f"{job.name}, logs in {job.log_dir}",
                    found=f"could not be started ({error})",
                    rule="the run directory must be writable and have room, and srun be there",
                    remedy="mend what is missing and start the same command again",
                )
            ) from error

    def place_samplers(self, *, replicas: int, tensor_parallel_size: int) -> Place:
        """Each sampler is a step on one node, with GPUs of its own there; see `PlacesSamplers`.

        Raises:
            ConfigError: The nodes have too few GPUs.
        """
        gpus, nodes = gpus_per_node(self._config), self._config.trainer.num_nodes
        room = gpus // tensor_parallel_size * nodes
        if gpus and replicas > room:
            raise ConfigError(
                explain(
                    "generation.replicas",
                    found=f"{replicas} x generation.tensor_parallel_size {tensor_parallel_size}, on {nodes} "
                    f"nodes with {gpus} GPUs each",
                    rule="every sampler has GPUs of its own, on one node",
                    remedy=f"set it to {max(1, room)} at most",
                )
            )

        def place(index: int) -> Placement:
            node, position = index % nodes, index // nodes
            first = position * tensor_parallel_size
            chosen = ",".join(str(number) for number in range(first, first + tensor_parallel_size))
            return Placement(
                prefix=tuple(
                    tied(
                        step_command(
                            self._config,
                            ["env", f"CUDA_VISIBLE_DEVICES={chosen}"] if gpus else [],
                            nodes=1,
                            tasks_per_node=1,
                            more=(f"--relative={node}",),
                        )
                    )
                ),
                is_child=False,
                neighbours=-(-(replicas - node) // nodes),
            )

        return place


def step_command(
    config: Config, command: Sequence[str], *, nodes: int, tasks_per_node: int, more: Sequence[str] = ()
) -> list[str]:
    """The arguments of srun and, in its container, `command`.

    Args:
        config: The configuration.
        command: What every task runs.
        nodes: How many of the allocation.
        tasks_per_node: Of the step.
        more: Options of srun.
    """
    gpus, run_dir = gpus_per_node(config), Path(config.run_dir).expanduser().absolute()
    slurm = config.launcher.slurm
    options = [
        "srun",
        f"--nodes={nodes}",
        f"--ntasks={nodes * tasks_per_node}",
        f"--ntasks-per-node={tasks_per_node}",
        "--distribution=block",  # ranks of a node follow each other
        "--kill-on-bad-exit=1",
        "--overlap",  # a sampler that waits for its next weights holds nothing that is needed here
        "--export=ALL",
        "--mpi=none",
        *more,
    ]
    if gpus:
        options.append(f"--gpus-per-node={gpus}")
    if slurm.cpus_per_task is not None:
        options.append(f"--cpus-per-task={slurm.cpus_per_task}")
    return [*options, *_in_container(slurm, command, run_dir, has_gpus=gpus > 0)]


def _in_container(slurm: SlurmConfig, command: Sequence[str], run_dir: Path, *, has_gpus: bool) -> list[str]:
    """The rest of srun's arguments."""
    if slurm.container_image is None:
        return list(command)
    mounts = [f"{run_dir}:{run_dir}", *slurm.container_mounts]
    if slurm.container_runtime == "pyxis":
        return [
            f"--container-image={slurm.container_image}",
            f"--container-mounts={','.join(mounts)}",
            # Without it the image's own value of a variable wins over the job's.
            f"--container-env={','.join([*slurm.environment, 'OMP_NUM_THREADS'])}",
            *command,
        ]
    bound = [word for mount in mounts for word in ("--bind", mount)]
    return [
        slurm.container_runtime,
        "exec",
        *(["--nv"] if has_gpus else []),
        *bound,
        slurm.container_image,
        *command,
    ]


def interpreter(slurm: SlurmConfig) -> str:
    """Of the ranks: this one's path means nothing in a container."""
    return slurm.python or (sys.executable if slurm.container_image is None else "python")


@dataclass(frozen=True)
class _Failure:
    """The rank that failed first, the exit code of the job, and what happened, in words."""

    rank: int
    code: int
    how: str


class SlurmJob:
    """A step. See `nemo_spin.selfplay.launcher.RankJob`."""

    def __init__(self, job: Job, config: Config) -> None:
        self._job = job
        self._was_stopped = self._was_interrupted = False
        job.log_dir.mkdir(parents=True, exist_ok=True)
        self._stem = str(job.log_dir / re.sub(r"[^\w.-]+", "-", job.name))
        self._step_log = Path(f"{self._stem}.srun.log")
        files = [step_files(self._stem, rank) for rank in range(job.ranks)]
        self._logs = [log for log, _ in files]
        self._failures = [failure for _, failure in files]
        for stale in (*self._failures, Path(f"{self._stem}.meeting.json")):
            stale.unlink(missing_ok=True)
        self._offsets = {log: _size(log) for log in (*self._logs, self._step_log)}
        slurm, trainer = config.launcher.slurm, config.trainer
        command = step_command(
            config,
            [interpreter(slurm), "-m", "nemo_spin.launch.rank", job.module, *job.arguments],
            nodes=trainer.num_nodes,
            tasks_per_node=trainer.devices,
        )
        with self._step_log.open("ab") as log:
            self._process = subprocess.Popen(
                tied(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(config),
                process_group=0,  # a key pressed at the terminal is not for srun
            )

    def poll(self) -> int | None:
        """The exit code once the step ended: 0, or that of the rank that failed first."""
        if self._process.poll() is None:
            return None
        return self._exit_code(self._process.returncode)

    def interrupt(self) -> None:
        """Asks every rank, and none of its children, to save and to end with `PREEMPTED`."""
        self._was_interrupted = True
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGUSR1)  # srun passes it on

    def stop(self) -> None:
        """Ends the step; returns when it is gone."""
        if self._process.poll() is None:
            self._was_stopped = True
            self._end()

    def describe_failure(self) -> str:
        """What happened to the rank that failed first, the end of its log, and the log's path."""
        if self.poll() in (None, 0):
            return f"{self._job.name}: no rank failed"
        first = self._first_failure()
        log = self._logs[first.rank] if first.rank >= 0 else self._step_log
        if _size(log) == self._offsets[log]:
            log = self._step_log  # the rank had nothing to say yet
        tail = quoted_end(log, self._offsets[log], aborted=_ABORTED.search(first.how) is not None)
        return f"{self._job.name}: {first.how}\n{tail}  log: {log}"

    def _environment(self, config: Config) -> dict[str, str]:
        environment = inherited_environment()
        if config.launcher.slurm.container_image is not None:
            environment.pop("PYTHONPATH", None)  # paths of this system, not of the container's
        return environment | {
            "OMP_NUM_THREADS": str(self._job.omp_num_threads),
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
            PROGRESS_VARIABLE: str(self._job.progress_path),
            STEP_VARIABLE: self._stem,
            JOIN_VARIABLE: str(config.launcher.join_timeout_s),
        }

    def _exit_code(self, code: int) -> int:
        """What the end of the step means; ranks that have saved end with 0, or srun would end others."""
        notes = self._notes()
        left = [note for note in notes.values() if note["message"] == str(PREEMPTED)]
        if len(left) < len(notes):
            return self._first_failure().code
        if code == 0:
            return PREEMPTED if left else 0
        if self._was_stopped or self._was_interrupted:
            return 128 + signal.SIGTERM
        return self._first_failure().code

    def _end(self) -> None:
        """srun ends its step at SIGTERM; it is killed itself only where it cannot."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_TERM_S)
        self._process.kill()
        self._process.wait()

    def _notes(self) -> dict[int, dict[str, Any]]:
        """What ranks noted about their failures."""
        listed = set(os.listdir(self._job.log_dir))
        read = {rank: read_note(path) for rank, path in enumerate(self._failures) if path.name in listed}
        return {rank: note for rank, note in read.items() if note}

    def _first_failure(self) -> _Failure:
        """A rank that ended without a word comes first: what others say follows from its end."""
        notes = self._notes()
        for rank, node, how in self._said_by_srun():
            if rank not in notes:
                code = int(how.rpartition(" ")[2]) if how.startswith("Exited with exit code") else 0
                killed = " (often: the machine ran out of memory)" if how == "Killed" else ""
                default = 128 + signal.SIGKILL if how == "Killed" else self._process.returncode
                return _Failure(rank, code or default, f"rank {rank} on {node}: {how}{killed}")
        if not notes:
            code = self._process.returncode
            return _Failure(-1, code if code > 0 else 128 - code, f"srun ended with exit code {code}")
        rank = self._first_noted(notes)
        note = notes[rank]
        is_exit = note["type"] == "SystemExit"
        code = int(note["message"]) if is_exit and note["message"].isdecimal() else 1
        reason = "" if is_exit else f" ({note['type']}: {note['message']})"
        return _Failure(rank, code, f"rank {rank} on {note['host']} ended with exit code {code}{reason}")

    def _first_noted(self, notes: Mapping[int, Mapping[str, Any]]) -> int:
        """The rank that noted its failure first; which node's clock is right only srun's order can tell."""
        said = [notes[rank]["host"] for rank, _, _ in self._said_by_srun() if rank in notes]
        of_host = [rank for rank in notes if not said or notes[rank]["host"] == said[0]]
        return min(of_host, key=lambda rank: float(notes[rank]["time"]))

    def _said_by_srun(self) -> list[tuple[int, str, str]]:
        """Rank, node and end of the tasks that ended badly by themselves, in srun's order."""
        said = []
        for line in last_lines(self._step_log, self._offsets[self._step_log], most=200):
            if _ENDED_BY_SRUN.search(line):
                break
            match = _SAID.search(line)
            if match:
                said += [(rank, match["node"], match["how"].strip()) for rank in _numbers(match["ranks"])]
        return said


def _numbers(text: str) -> list[int]:
    """Slurm's `0,3-5` is 0, 3, 4, 5."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
