"""A sampler's server has an address, and an address a server."""

from __future__ import annotations

import pytest

from tests.unit.config.test_validate import accepted, refused

SERVER = "generation.engine=vllm_server"


def test_engine_and_address_belong_together() -> None:
    accepted(SERVER, "generation.server=http://127.0.0.1:8000")
    assert "null, with generation.engine vllm_server" in refused(SERVER)
    assert "needs an address, every other engine has none" in refused("generation.server=http://a:1")


@pytest.mark.parametrize("address", ["127.0.0.1:8000", "ftp://a:1", "http://a:1/v1", "http://u:p@a:1"])
def test_an_address_is_scheme_host_and_port(address: str) -> None:
    assert "scheme, host and port" in refused(SERVER, f"generation.server={address}")
