"""A sampler's server has an address, and an address has a server."""

from __future__ import annotations

import re

from nemo_spin.config.mistakes import Mistake, mistake
from nemo_spin.config.schema import Config

SERVER_KEYS = ("generation.engine", "generation.server")
_ADDRESS = re.compile(r"https?://(?:[\w.-]+|\[[0-9a-fA-F:]+\])(?::\d{1,5})?/?")


def server_is_for_its_engine(config: Config) -> list[Mistake]:
    """`server` is the address of `engine: vllm_server`."""
    engine, server = config.generation.engine, config.generation.server
    if engine != "vllm_server" and server is None:
        return []
    if engine != "vllm_server" or server is None:
        return [
            mistake(
                "generation.server",
                found=f"{server or 'null'}, with generation.engine {engine}",
                rule="generation.engine=vllm_server needs an address, every other engine has none",
                remedy="set both, or leave generation.server out",
                also=("generation.engine",),
            )
        ]
    if _ADDRESS.fullmatch(server):
        return []
    return [
        mistake(
            "generation.server",
            found=server,
            rule="scheme, host and port of a vLLM server",
            remedy="such as http://127.0.0.1:8000",
        )
    ]
