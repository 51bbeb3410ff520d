"""Messages between the command on rank 0 and those that follow it: lines of JSON over TCP.

A file in the run directory tells followers where to connect, and a token that only readers of
that file know: without it a connection is dropped, because followers start what they are told.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = ".external.json"
BEAT_S = 2.0  # between two signs of life, in either direction
HELLO_S = 10.0  # to make a connection, and for the first message
_LONGEST_LINE = 1 << 20


@dataclass(frozen=True)
class Door:
    """Where rank 0's command listens.

    Attributes:
        address: Name or number of its host.
        port: On it.
        token: What a follower must know.
    """

    address: str
    port: int
    token: str

    @classmethod
    def of(cls, address: str, port: int) -> Door:
        """A new one."""
        return cls(address, port, secrets.token_hex(16))

    def opens_for(self, token: object) -> bool:
        """Whether this is the token."""
        return isinstance(token, str) and hmac.compare_digest(token.encode(), self.token.encode())

    def write(self, path: Path) -> None:
        """Makes it known to whoever may read the run directory as this user."""
        partial = path.with_name(f"{path.name}.partial")
        partial.unlink(missing_ok=True)
        with os.fdopen(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as stream:
            json.dump(vars(self), stream)
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> Door | None:
        """What the file says; None where it is not there (yet)."""
        if not path.parent.is_dir() or path.name not in os.listdir(path.parent):  # asks the server, see NFS
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


class Line:
    """One connection: whole messages in and out.

    Args:
        connection: It is closed with this object.
        silence_s: Seconds without a message after which the other end counts as gone.
    """

    def __init__(self, connection: socket.socket, silence_s: float) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(silence_s)
        self._connection = connection
        self._silence_s = silence_s
        self._buffer = b""
        self._sending = threading.Lock()

    def expect_within(self, silence_s: float) -> None:
        """Changes after how many seconds of silence the other end counts as gone."""
        self._silence_s = silence_s
        self._connection.settimeout(silence_s)

    def send(self, kind: str, **values: Any) -> None:
        """Sends a message.

        Raises:
            OSError: The other end is gone.
        """
        text = json.dumps({"kind": kind, **values}).encode() + b"\n"
        with self._sending:
            self._connection.sendall(text)

    def receive(self) -> dict[str, Any]:
        """Waits for the next message.

        Raises:
            OSError: The other end is gone, or sends no messages (TimeoutError: it is silent).
        """
        while b"\n" not in self._buffer:
            try:
                new = self._connection.recv(65536)
            except TimeoutError as error:
                raise TimeoutError(f"said nothing for {self._silence_s:g} s") from error
            if not new:
                raise ConnectionError("closed the connection")
            self._buffer += new
            if len(self._buffer) > _LONGEST_LINE:
                raise ConnectionError("sends what is no message")
        line, self._buffer = self._buffer.split(b"\n", 1)
        try:
            message = json.loads(line)
        except ValueError as error:
            raise ConnectionError("sends what is no message") from error
        if not isinstance(message, Mapping) or "kind" not in message:
            raise ConnectionError("sends what is no message")
        return dict(message)

    def close(self) -> None:
        """Ends the connection; whoever waits in `receive` is woken."""
        with contextlib.suppress(OSError):  # the other end was faster
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
