"""What is tried again, and what is not: messages as the libraries and this package word them."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_spin.config.schema import Config
from nemo_spin.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ExportError,
    GateError,
    GenerationError,
    GuardError,
    PreemptedError,
    StageError,
)
from nemo_spin.selfplay import loop
from nemo_spin.selfplay import state as states
from nemo_spin.selfplay.faults import FAULTS, worth_another_try
from nemo_spin.selfplay.run_directory import RunDirectory
from nemo_spin.selfplay.state import StateFile, read_state
from nemo_spin.selfplay.storage import storage_error
from tests.unit.selfplay.conftest import StandIns

KILLED = "train of iteration 0: rank 1 was killed by SIGKILL (often: the machine ran out of memory)"
RETRIED = [
    KILLED,
    "rank 1 on node2: Killed (often: the machine ran out of memory)",
    "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3, unhandled system error, "
    "NCCL version 2.27\n ncclSystemError: System call (e.g. socket, malloc) failed",
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely",
    "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=9) ran for 600000 ms",
    "RuntimeError: [pair.cc:534] Connection closed by peer [127.0.0.1]:3345",
    "RuntimeError: [unbound_buffer.cc:84] Timed out waiting 1800000ms for recv operation to complete",
    "torch.distributed.DistNetworkError: The client socket has failed to connect",
    'score of iteration 1: rank 3 in "scoring" gave no sign of life for 600 s',
    'phase "training" on rank 0: rank 2 did not reach the phase in 1800 s',
    "OSError: [Errno 5] Input/output error: 'step-5/weights.distcp'",
    "OSError: [Errno 116] Stale file handle",
    "generation: the sampler's process (at shard a.parquet): was ended by SIGKILL without saying why",
    "generation: answering a.parquet: not done after 3600 s; the sampler was ended",
    "the sampler's process (at load m): ended with exit code 137\n  | srun: error: node2: task 0: Killed",
    "srun ended with exit code 1\n  | srun: error: Task launch for StepId=7.2 failed on node node2: "
    "Socket timed out on send/recv operation",
    "  | srun: error: Unable to confirm allocation for job 7: Unable to contact slurm controller "
    "(connect failure)",
    "  | srun: error: Node failure on node2",
    "rank 7 on node1: Aborted (core dumped)",
    "score of iteration 0: rank 1 was ended by SIGBUS",
    "the sampler's process (at load m): ended with exit code 135\n  | srun: error: node2: task 0: Bus error",
    "generation: the sampler's process (at load m): was ended by SIGABRT without saying why",
    "[PG ID 0 Rank 3] ProcessGroupNCCL's watchdog got stuck for 480 seconds without making progress",
]
STOPPED = [
    "ValueError: a defect of this package",
    "ncclInvalidUsage: This usually reflects invalid usage of NCCL library",
    "ncclInternalError: Internal check failed. Connection closed by peer",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB\n Connection closed by peer",
    "CUDA error: uncorrectable ECC error encountered",
    "OSError: [Errno 28] No space left on device\n rank 0 was killed by SIGKILL",
    "PermissionError: [Errno 13] Permission denied",
    "rank 3 was ended by SIGABRT\n  | CUDA error: an illegal memory access was encountered",
    "rank 3 was ended by SIGABRT\n  | CUDA error: device-side assert triggered",
    "RuntimeError: DataLoader worker is killed by signal: Bus error.",
    "train of iteration 0: made no progress for 86400 s, and was ended",
    "  | srun: error: Unable to create step for job 7: More processors requested than permitted",
]


@pytest.mark.parametrize("text", RETRIED)
def test_what_may_pass_is_tried_again(text: str) -> None:
    assert worth_another_try(StageError(text))


@pytest.mark.parametrize("text", STOPPED)
def test_what_would_fail_again_stops(text: str) -> None:
    assert worth_another_try(StageError(text)) is None


def test_the_kind_of_an_error_counts_before_its_words() -> None:
    for kind in (ConfigError, GateError, GuardError, CheckpointError, PreemptedError, RuntimeError):
        assert worth_another_try(kind(KILLED)) is None
    for kind in (DataError, GenerationError, StageError, OSError):
        assert worth_another_try(kind(KILLED))


@pytest.mark.parametrize(
    ("number", "retried"),
    [
        (errno.EIO, True),
        (errno.ESTALE, True),
        (errno.ETIMEDOUT, True),
        (errno.ESHUTDOWN, True),
        (errno.ENOSPC, False),
        (errno.EDQUOT, False),
        (errno.EROFS, False),
        (errno.EACCES, False),
    ],
)
def test_storage_by_what_the_system_said(number: int, retried: bool) -> None:
    error = OSError(number, os.strerror(number), "/run/file")
    of_files = [
        CheckpointError(f"/models/theta_0/model-1.safetensors: cannot be read ({os.strerror(number)})"),
        CheckpointError(f"/run/train/checkpoints: a checkpoint could not be written ({error})"),
        ExportError(f"/run/iter_00/model: could not be written ({os.strerror(number)})"),
    ]
    for kind in (error, storage_error(Path("/run"), error), *of_files):
        assert bool(worth_another_try(kind)) is retried


def test_every_fault_has_a_source_and_those_that_stop_come_first() -> None:
    assert all(fault.source and fault.what for fault in FAULTS)
    first_retry = next(index for index, fault in enumerate(FAULTS) if fault.retry)
    assert not any(fault.retry for fault in FAULTS[:first_retry])


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_stage_is_attempted_again_after_longer_and_longer_waits(
    run: Callable[[Config], str],
    make_config: Callable[..., Config],
    stand_ins: StandIns,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    *,
    failures: int,
) -> None:
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == failures:
            stand_ins.fail_in = None  # it has passed

    monkeypatch.setattr(loop.time, "sleep", wait)
    stand_ins.fail_in, stand_ins.error = "score of iteration 0", StageError(KILLED)
    config = make_config(launcher={"attempts": 3, "backoff_s": 7.0}, spin={"iterations": 1, "lr": 1e-4})
    if failures == 3:
        with pytest.raises(StageError, match="killed by SIGKILL"):
            run(config)
        assert waits == [7.0, 14.0]
        return
    screen = run(config)
    assert waits == [7.0, 14.0][:failures]
    assert "score of iteration 0 failed (a process was killed): attempt 2 of 3 in 7 s" in screen
    assert stand_ins.started.count("score of iteration 0") == failures + 1
    state = read_state(RunDirectory(tmp_path / "run").state_path)
    assert state is not None
    assert state.stages["iter_00/score"].attempts == failures + 1
    assert {entry.status for entry in state.stages.values()} == {"done"}


def test_a_stop_while_it_waits_is_an_interruption(
    run: Callable[[Config], str],
    make_config: Callable[..., Config],
    stand_ins: StandIns,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def told_to_leave(seconds: float) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop.time, "sleep", told_to_leave)
    stand_ins.fail_in, stand_ins.error = "score of iteration 0", StageError(KILLED)
    with pytest.raises(SystemExit) as stopped:
        run(make_config())
    assert stopped.value.code == 75
    state = read_state(RunDirectory(tmp_path / "run").state_path)
    assert state is not None
    assert (state.status, state.stages["iter_00/score"].status) == ("interrupted", "interrupted")


def test_a_defect_is_not_attempted_again(
    run: Callable[[Config], str], make_config: Callable[..., Config], stand_ins: StandIns
) -> None:
    stand_ins.fail_in, stand_ins.error = (
        "score of iteration 0",
        StageError("exit code 1: ValueError"),
    )
    with pytest.raises(StageError):
        run(make_config())
    assert stand_ins.started.count("score of iteration 0") == 1


def test_attempts_count_from_the_last_new_shard(
    run: Callable[[Config], str],
    make_config: Callable[..., Config],
    stand_ins: StandIns,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Three hiccups in one long stage, with work done between them, are no reason to give up."""
    waits: list[float] = []
    scored = RunDirectory(tmp_path / "run").iteration(0).scored

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 4:
            stand_ins.fail_in = None

    work = stand_ins.work

    def work_on(label: str, directory: Path, *rest: Any, **more: Any) -> None:
        if label == "score of iteration 0" and len(waits) != 1:  # one attempt leaves nothing
            (scored / f"train-shard-{len(waits):05d}-of-00009.parquet").touch()
        work(label, directory, *rest, **more)

    monkeypatch.setattr(loop.time, "sleep", wait)
    monkeypatch.setattr(stand_ins, "work", work_on)
    stand_ins.fail_in, stand_ins.error = "score of iteration 0", StageError(KILLED)
    config = make_config(launcher={"attempts": 3, "backoff_s": 7.0}, spin={"iterations": 1, "lr": 1e-4})
    screen = run(config)
    assert waits == [7.0, 14.0, 7.0, 7.0]
    assert "attempt 2 of 3 in 7 s" in screen and "attempt 3 of 3 in 14 s" in screen


def test_what_may_pass_asks_for_another_start_until_some_in_a_row_were_in_vain(
    run: Callable[[Config], str],
    make_config: Callable[..., Config],
    stand_ins: StandIns,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    clock = [1e9]
    monkeypatch.setattr(states.time, "time", lambda: clock[0])
    config = make_config(launcher={"attempts": 1}, spin={"iterations": 1, "lr": 1e-4})
    stand_ins.fail_in, stand_ins.error = "score of iteration 0", StageError(KILLED)
    codes = []

    def start() -> int:
        with pytest.raises(StageError, match="killed by SIGKILL") as failed:
            run(config)
        return failed.value.exit_code

    for minutes in (0, 4, 4, 4):  # a node that is not yet known to be lost fails at once
        clock[0] += 60 * minutes
        codes.append(start())
    assert codes == [76, 76, 76, 76]
    (RunDirectory(tmp_path / "run").iteration(0).scored / "train-shard-00000-of-00002.parquet").touch()
    assert start() == 76, "what was there before is no progress"
    clock[0] += 2 * 3600
    assert start() == 1
    assert start() == 76, "the next start is a person's, and counts anew"
    clock[0] += 3 * 3600
    assert start() == 76, "three are tried however long they take"
    stand_ins.fail_in = None
    run(config)
    state = read_state(RunDirectory(tmp_path / "run").state_path)
    assert state is not None and state.fruitless == 0


def test_what_would_fail_again_asks_for_no_other_start(
    run: Callable[[Config], str], make_config: Callable[..., Config], stand_ins: StandIns
) -> None:
    stand_ins.fail_in, stand_ins.error = "score of iteration 0", GateError("the ln 2 gate: 0.9")
    with pytest.raises(GateError) as failed:
        run(make_config())
    assert failed.value.exit_code == 2


def test_a_file_system_that_fails_even_the_count_asks_for_another_start(
    run: Callable[[Config], str],
    make_config: Callable[..., Config],
    stand_ins: StandIns,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone = OSError(errno.ESHUTDOWN, os.strerror(errno.ESHUTDOWN), "/run/state.json")
    count: list[int] = []

    def unwritten(self: StateFile, **limits: float) -> bool:
        count.append(1)
        raise storage_error(Path("/run"), gone)

    monkeypatch.setattr(StateFile, "came_to_nothing", unwritten)
    stand_ins.fail_in, stand_ins.error = (
        "score of iteration 0",
        ConnectionResetError("Connection reset by peer"),
    )
    with pytest.raises(StageError, match="Connection reset by peer") as failed:
        run(make_config(launcher={"attempts": 1}))
    assert failed.value.exit_code == 76 and count
