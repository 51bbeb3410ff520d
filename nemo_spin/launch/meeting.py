"""Where the ranks of a step meet: rank 0 chooses a port on its own host and writes it down.

The file lies in the run directory, which all hosts share in any case. So nobody has to know
beforehand on which host rank 0 starts, which of its ports is free, or what name it has elsewhere.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

_POLL_S = 0.2


def own_address(environment: Mapping[str, str]) -> str:
    """The address under which other hosts of the job reach this one.

    It is that from which this host talks to the one where srun runs. Without Slurm: the host's name.
    """
    launcher = environment.get("SLURM_LAUNCH_NODE_IPADDR")
    if launcher is None:
        return socket.gethostname()
    family = socket.AF_INET6 if ":" in launcher else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((launcher, 9))  # sends nothing: it asks the routing table
        return str(probe.getsockname()[0])


def call_together(path: Path, address: str) -> tuple[socket.socket, int]:
    """Rank 0: reserves a port and writes address and port to `path`.

    Returns:
        A socket that keeps the port from others while rank 0 starts to listen there, and the port.
    """
    holder = reserve_port(address)
    port = int(holder.getsockname()[1])
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps({"address": address, "port": port}), encoding="utf-8")
    partial.replace(path)
    return holder, port


def await_call(path: Path, timeout_s: float) -> tuple[str, int]:
    """Other ranks: address and port, once rank 0 wrote them.

    Raises:
        TimeoutError: It did not within `timeout_s` seconds.
    """
    end = time.monotonic() + timeout_s
    while True:
        if path.name in os.listdir(path.parent):  # asks the server; whether a name is there NFS remembers
            call = json.loads(path.read_text(encoding="utf-8"))
            return str(call["address"]), int(call["port"])
        if time.monotonic() > end:
            raise TimeoutError(
                f"rank 0 has not started within {timeout_s:g} s (launcher.join_timeout_s): no {path}"
            )
        time.sleep(_POLL_S)


def reserve_port(address: str) -> socket.socket:
    """A socket that keeps a port of this host from others; rank 0 may listen there while it is held."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    holder = socket.socket(family)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1" if address == "127.0.0.1" else "", 0))
    return holder
