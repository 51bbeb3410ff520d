"""Two ranks that add up numbers: process groups, ports and GPUs' peer access in one small test."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time

from nemo_spin.generation.environment import package_parent
from nemo_spin.selfplay.doctor.finding import Finding

_NUM_RANKS = 2
_TIMEOUT_S = 90.0
_MODULE = "nemo_spin.megatron.smoke"


def examine_collectives(*, timeout_s: float = _TIMEOUT_S) -> list[Finding]:
    """Starts the ranks and waits for them, at most `timeout_s` seconds."""
    if importlib.util.find_spec("torch") is None:
        return []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ranks = [_start(rank, port) for rank in range(_NUM_RANKS)]
    end = time.monotonic() + timeout_s
    try:
        printed = [rank.communicate(timeout=max(0.0, end - time.monotonic())) for rank in ranks]
    except subprocess.TimeoutExpired:
        return [_failed(f"{_NUM_RANKS} ranks did not finish within {timeout_s:.0f} s")]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for number, (rank, (_, errors)) in enumerate(zip(ranks, printed, strict=True)):
        if rank.returncode:
            last = errors.strip().splitlines()[-1:] or ["without a word"]
            return [_failed(f"rank {number} ended with {rank.returncode}: {last[0]}")]
    return [Finding("collective", f"{_NUM_RANKS} ranks: {printed[0][0].strip()}")]


def _start(rank: int, port: int) -> subprocess.Popen[str]:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": _NUM_RANKS, "MASTER_PORT": port}
    environment = {name: str(value) for name, value in names.items()}
    known = os.environ.get("PYTHONPATH")
    path = f"{package_parent()}{os.pathsep}{known}" if known else str(package_parent())
    return subprocess.Popen(
        [sys.executable, "-m", _MODULE],
        env={**os.environ, **environment, "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _failed(text: str) -> Finding:
    remedy = "look at the firewall of the loopback interface, and with GPUs at NCCL_DEBUG=INFO"
    return Finding("collective", text, "error", remedy)
