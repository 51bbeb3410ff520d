"""Runs a function in several real processes over gloo, on CPU.

Every distributed test uses this and nothing else: the function must live at module
level (it is pickled by name), gets its arguments and returns rank 0's result.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_TIMEOUT_S = 300.0


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _rank_main(
    function: Callable[..., Any], rank: int, world_size: int, port: int, args: tuple[Any, ...], results: Any
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    log = Path(tempfile.gettempdir()) / f"nemo_spin-test-{port}-rank{rank}.log"
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    torch.set_num_threads(1)
    try:
        result = function(*args)
        results.put((rank, True, result if rank == 0 else None))
    except BaseException as error:
        results.put((rank, False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
        raise
    finally:
        log.unlink(missing_ok=True)


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> Any:
    """Calls `function(*args)` in `world_size` processes; returns what rank 0 returned.

    The function initialises the process groups itself (`megatron.runtime.initialize`).

    Raises:
        AssertionError: A rank failed; the message is that rank's traceback.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    port = _free_port()
    os.environ["OMP_NUM_THREADS"] = "1"
    ranks = [
        context.Process(target=_rank_main, args=(function, rank, world_size, port, args, results))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    value = None
    try:
        for _ in ranks:
            try:
                rank, succeeded, outcome = results.get(timeout=_TIMEOUT_S)
            except queue.Empty:
                raise AssertionError(f"no rank answered for {_TIMEOUT_S:.0f} s") from None
            if not succeeded:
                raise AssertionError(f"rank {rank} failed: {outcome}")
            if rank == 0:
                value = outcome
        for process in ranks:
            process.join(timeout=30)
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
    return value
