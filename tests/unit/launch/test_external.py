"""What rank 0 and its followers agree on. Whole commands follow each other in tests/functional."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from nemo_spin.config.load import from_mapping
from nemo_spin.errors import ConfigError
from nemo_spin.launch.external import checked_place
from nemo_spin.launch.wire import Door, Line


def test_as_many_ranks_are_started_as_the_configuration_has() -> None:
    config = from_mapping({"trainer": {"devices": 2, "num_nodes": 2}, "launcher": {"name": "external"}})
    place = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert checked_place(config, place).local_rank == 1
    with pytest.raises(ConfigError, match="2 x 2, and 8 ranks were started"):
        checked_place(config, {**place, "WORLD_SIZE": "8"})


def test_only_this_user_reads_the_token(tmp_path: Path) -> None:
    door = Door.of("10.0.0.1", 1234)
    assert Door.read(tmp_path / "nowhere" / "door") is None
    assert Door.read(tmp_path / "door") is None
    door.write(tmp_path / "door")
    assert Door.read(tmp_path / "door") == door
    assert (tmp_path / "door").stat().st_mode & 0o777 == 0o600
    assert door.opens_for(door.token) and not door.opens_for("") and not door.opens_for(None)
    (tmp_path / "door").write_text('{"address": "10.0.0.1"')
    assert Door.read(tmp_path / "door") is None


def test_a_line_gives_whole_messages_and_notices_silence_and_rubbish() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        line = Line(server.accept()[0], 60.0)
    line.expect_within(0.1)
    theirs.sendall(b'{"kind": "beat"}\n{"kind": "bye", "co')
    assert line.receive() == {"kind": "beat"}
    with pytest.raises(TimeoutError, match=r"said nothing for 0.1 s"):
        line.receive()
    theirs.sendall(b'de": 3}\n')
    assert line.receive() == {"kind": "bye", "code": 3}
    theirs.sendall(b"GET / HTTP/1.1\n")
    with pytest.raises(ConnectionError, match="no message"):
        line.receive()
    theirs.close()
    with pytest.raises(ConnectionError, match="closed the connection"):
        line.receive()
    line.close()
