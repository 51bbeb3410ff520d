"""The end of a rank's log, as NCCL's watchdog leaves it: worded like PyTorch 2.9's, with invented numbers."""

# ruff: noqa: E501  (lines as long as theirs)

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_spin.errors import StageError
from nemo_spin.launch.log_tail import last_lines, quoted_end
from nemo_spin.selfplay.faults import worth_another_try

STAMP = "[rank37]:[E1122 02:14:07.{:09d} ProcessGroupNCCL.cpp:{}]"
GROUP = "[PG ID 2 PG GUID 3(DATA_PARALLEL_GROUP) Rank 5]"
TIMEOUT = (
    "[Rank 5] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=18234, OpType=_REDUCE_SCATTER_BASE, "
    "NumelIn=1073741824, NumelOut=33554432, Timeout(ms)=1800000) ran for 1800013 milliseconds before timing out."
)
REMOTE = (
    "NCCL error: remote process exited or there was a network error, NCCL version 2.27.5\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.\n"
    "Last error:\nNET/IB: Got completion from peer 10.1.0.7<51122> with status=12 opcode=32767 vendor err 129"
)
ILLEGAL = (
    "CUDA error: an illegal memory access was encountered\n"
    "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
LIBRARY = "/usr/local/lib/python3.12/dist-packages/torch/lib/libtorch_cuda.so"
FRAMES = "\n".join(
    [
        "Exception raised from checkTimeout at /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:635 "
        "(most recent call first):",
        "frame #0: c10::Error::Error(c10::SourceLocation, std::__cxx11::basic_string<char, std::char_traits<char>, "
        "std::allocator<char> >) + 0x98 (0x7f0bd9a785e8 in /usr/local/lib/python3.12/dist-packages/torch/lib/libc10.so)",
        f"frame #1: c10d::ProcessGroupNCCL::WorkNCCL::checkTimeout(std::optional<std::chrono::duration<long, "
        f"std::ratio<1l, 1000l> > >) + 0x23d (0x7f0b7d2d9bfd in {LIBRARY})",
        f"frame #2: c10d::ProcessGroupNCCL::Watchdog::runLoop() + 0xc80 (0x7f0b7d2dcc60 in {LIBRARY})",
        f"frame #3: c10d::ProcessGroupNCCL::Watchdog::run() + 0xd2 (0x7f0b7d2ddc12 in {LIBRARY})",
        "frame #4: <unknown function> + 0xecdb4 (0x7f0bda0ecdb4 in /lib/x86_64-linux-gnu/libstdc++.so.6)",
        "frame #5: <unknown function> + 0x9caa4 (0x7f0bdb29caa4 in /lib/x86_64-linux-gnu/libc.so.6)",
        "frame #6: <unknown function> + 0x129c6c (0x7f0bdb329c6c in /lib/x86_64-linux-gnu/libc.so.6)",
    ]
)
THREADS = "\n".join(
    [
        "Fatal Python error: Aborted",
        "",
        "Thread 0x00007f0a2bfff6c0 (most recent call first):",
        '  File "/usr/lib/python3.12/threading.py", line 359 in wait',
        '  File "/opt/nemo_spin/selfplay/heartbeat.py", line 45 in _beat',
        '  File "/usr/lib/python3.12/threading.py", line 1030 in _bootstrap',
        "",
        "Thread 0x00007f0bdb1fe740 (most recent call first):",
        '  File "/opt/megatron/core/distributed/param_and_grad_buffer.py", line 402 in start_grad_sync',
        '  File "/opt/megatron/core/pipeline_parallel/schedules.py", line 2105 in forward_backward_pipelining',
        *(f'  File "/opt/lightning/pytorch/loops/part_{n}.py", line {n} in run' for n in range(14)),
        '  File "<frozen runpy>", line 88 in _run_code',
        "",
        "Extension modules: numpy._core._multiarray_umath, torch._C, yaml._yaml, pyarrow.lib (total: 212)",
    ]
)


def watchdog_abort(reason: str, frames: int) -> str:
    """The last of a log after millions of other bytes."""
    ended = f"{GROUP} Process group watchdog thread terminated with exception: {reason}\n"
    listed = FRAMES + "\n" + "\n".join(f"frame #{n}: clone3 + 0x2c ({LIBRARY})" for n in range(7, frames))
    return (
        "W1121 20:01:11 wandb: WARNING [Errno 13] Permission denied: '/root/.netrc'\n"
        + "step 18233: loss 0.52\n" * 20_000
        + f"{STAMP.format(123456789, 632)} {reason}\n"
        + f"{STAMP.format(123500000, 684)} [Rank 5] Some NCCL operations have failed or timed out. Due to the "
        "asynchronous nature of CUDA kernels, subsequent GPU operations might run on corrupted/incomplete data.\n"
        + f"{STAMP.format(123600000, 698)} [Rank 5] To avoid data inconsistency, we are taking the entire process "
        "down.\n"
        + f"{STAMP.format(124000000, 1895)} {ended}{listed}\n\n"
        + f"terminate called after throwing an instance of 'c10::DistBackendError'\n  what():  {ended}{listed}\n\n"
        + THREADS
        + "\n"
    )


@pytest.mark.parametrize(
    ("reason", "what"),
    [(TIMEOUT, "a collective hung"), (REMOTE, "the network of NCCL failed"), (ILLEGAL, None)],
)
def test_the_reason_of_an_abort_is_found_behind_frames_and_threads(
    tmp_path: Path, reason: str, what: str | None
) -> None:
    log = tmp_path / "rank_37.log"
    log.write_text(watchdog_abort(reason, frames=60))
    shown = quoted_end(log, 0, aborted=True)
    first, dots, *rest = shown.splitlines()
    assert any(word in first for word in ("Watchdog caught", "ncclRemoteError", "illegal memory access"))
    assert dots == "  | …" and len(rest) == 15 and rest[-1].startswith("  | Extension modules")
    failure = StageError(f"train of iteration 0: rank 37 on node5: Aborted\n{shown}  log: {log}")
    assert worth_another_try(failure) == what


def test_what_is_not_known_is_an_abort_and_what_was_before_does_not_count(tmp_path: Path) -> None:
    log = tmp_path / "rank_0.log"
    log.write_text("ncclSystemError: of an earlier attempt\n")
    offset = log.stat().st_size
    with log.open("a") as stream:
        stream.write("double free or corruption (!prev)\n" + THREADS)
    shown = quoted_end(log, offset, aborted=True)
    assert "ncclSystemError" not in shown and "…" not in shown
    assert worth_another_try(StageError(f"rank 0 was ended by SIGABRT\n{shown}")) == "a process aborted"


def test_only_an_abort_is_looked_into(tmp_path: Path) -> None:
    """Of an exception the last lines say all; a warning hours earlier is not its reason."""
    log = tmp_path / "rank_0.log"
    log.write_text("wandb: Connection reset by peer\n" + "step\n" * 20 + "ValueError: not finite\n")
    shown = quoted_end(log, 0, aborted=False)
    assert "Connection" not in shown and shown.endswith("  | ValueError: not finite\n")
    assert len(last_lines(log, 0)) == 15 and last_lines(tmp_path / "none", 0) == []
