"""Where the ranks of a step meet."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest

from nemo_spin.launch.meeting import await_call, call_together, own_address


def test_the_others_wait_for_the_call_of_rank_0(tmp_path: Path) -> None:
    path = tmp_path / "meeting.json"
    held: list[socket.socket] = []
    caller = threading.Timer(0.3, lambda: held.append(call_together(path, "127.0.0.1")[0]))
    caller.start()
    address, port = await_call(path, timeout_s=10)
    caller.join()
    assert address == "127.0.0.1" and port == held[0].getsockname()[1]
    with socket.create_server((address, port)) as server:  # as rank 0 does while the port is held
        assert server.getsockname()[1] == port
    held[0].close()


def test_a_call_that_does_not_come_is_an_error_that_says_so(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"rank 0 has not started within 0.1 s"):
        await_call(tmp_path / "meeting.json", timeout_s=0.1)
    assert time.monotonic() - began < 5


def test_the_address_is_the_one_that_leads_to_the_host_of_srun() -> None:
    assert own_address({"SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}) == "127.0.0.1"
    assert own_address({}) == socket.gethostname()
