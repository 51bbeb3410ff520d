"""Runs a function in several real processes: over gloo on CPU, over NCCL where there are GPUs.

Every distributed test uses this and nothing else: the function must live at module
level (it is pickled by name), gets its arguments and returns rank 0's result. The
processes live on from test to test, because importing Megatron takes longer than most
tests; process groups are made and destroyed each time. With GPUs every rank has one of
its own; a test that wants more ranks than there are GPUs is skipped.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import queue
import random
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.context import SpawnProcess
from typing import Any

import pytest

from nemo_spin.launch.rank import die_with_launcher

_TIMEOUT_S = 300.0
_MOST_THREADS = 300  # every group of gloo that something still holds is one, and wakes 100 times a second


def _free_port() -> int:
    """Below those that the system hands to others while ranks still start."""
    for port in random.sample(range(20_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port
    raise AssertionError("a hundred ports drawn at random are all taken")


def _rank_main(tasks: Any, results: Any) -> None:
    """One process: waits for tasks until it is told to end."""
    with tempfile.TemporaryFile() as log:  # warnings of a dozen libraries; nobody reads them
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    die_with_launcher()  # a killed test run leaves nothing behind
    os.setpgid(0, 0)  # nor does a killed rank: writers of checkpoints are its children
    import torch

    torch.set_num_threads(1)
    while (task := tasks.get()) is not None:
        function, rank, world_size, port, args = task
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        try:
            value = function(*args)
            _leave_groups()
            results.put((rank, True, _on_cpu(value) if rank == 0 else None, _num_threads()))
        except BaseException as error:
            results.put((rank, False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}", 0))


def _num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _on_cpu(value: Any) -> Any:
    """`value` with the tensors in its lists, tuples and dictionaries on the CPU, to be sent home."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_on_cpu(entry) for entry in value)
    return value


def _leave_groups() -> None:
    from torch import distributed

    if distributed.is_initialized():
        from nemo_spin.megatron.runtime import finalize

        distributed.barrier()
        finalize()


class _Pool:
    """Processes that wait for work; a failure ends all of them, the next task starts new ones."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._results = self._context.Queue()
        self._ranks: list[tuple[SpawnProcess, Any]] = []

    def run(self, function: Callable[..., Any], world_size: int, args: tuple[Any, ...]) -> Any:
        while len(self._ranks) < world_size:
            tasks = self._context.Queue()
            process = self._context.Process(target=_rank_main, args=(tasks, self._results))
            process.start()
            self._ranks.append((process, tasks))
        port = _free_port()
        for rank in range(world_size):
            self._ranks[rank][1].put((function, rank, world_size, port, args))
        value, num_threads = None, 0
        for _ in range(world_size):
            rank, succeeded, outcome, own_threads = self._answer()
            if not succeeded:
                self.kill()
                raise AssertionError(f"rank {rank} failed: {outcome}")
            value = outcome if rank == 0 else value
            num_threads = max(num_threads, own_threads)
        if num_threads > _MOST_THREADS:
            self.kill()
        return value

    def _answer(self) -> tuple[int, bool, Any, int]:
        """What the next rank to end has to say; one that was killed says nothing."""
        end = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < end:
            with contextlib.suppress(queue.Empty):
                answer: tuple[int, bool, Any, int] = self._results.get(timeout=1.0)
                return answer
            for rank, (process, _) in enumerate(self._ranks):
                if not process.is_alive():
                    return rank, False, f"its process has ended ({process.exitcode})", 0
        self.kill()
        raise AssertionError(f"no rank answered for {_TIMEOUT_S:.0f} s")

    def kill(self) -> None:
        for process, _ in self._ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.kill()  # one that has not made its group yet
            process.join()
        self._ranks = []
        self._results = self._context.Queue()


_pool = _Pool()
atexit.register(_pool.kill)


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> Any:
    """Calls `function(*args)` in `world_size` processes; returns what rank 0 returned.

    The function initialises the process groups itself (`megatron.runtime.initialize`).

    Raises:
        AssertionError: A rank failed; the message is that rank's traceback.
    """
    import torch

    if torch.cuda.is_available() and torch.cuda.device_count() < world_size:
        pytest.skip(f"wants {world_size} GPUs, there are {torch.cuda.device_count()}")
    os.environ["OMP_NUM_THREADS"] = "1"
    return _pool.run(function, world_size, args)
