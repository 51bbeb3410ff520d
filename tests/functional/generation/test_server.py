"""A real vLLM server that is running gets the weights of the run, and answers like an engine of our own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_spin.generation.environment import find_python
from nemo_spin.generation.keeper import EngineKeeper
from tests import models
from tests.functional.generation.harness import Stage, by_key, configuration
from tests.functional.generation.test_refresh import canary_of, run

pytestmark = pytest.mark.slow

_STARTS_WITHIN_S = 240.0


@pytest.fixture(scope="module")
def theta_1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_model(tmp_path_factory.mktemp("models") / "theta_1", seed=1)


@pytest.fixture(scope="module")
def server(theta_1: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server that begins with theta_1."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    python = find_python(os.environ.get("NEMO_SPIN_VLLM_PYTHON"))
    if subprocess.run([python, "-c", "import uvicorn"], capture_output=True).returncode:
        pytest.skip("the sampler's environment has what vLLM's engine needs, but not what its server needs")
    options = f"--host 127.0.0.1 --port {port} --dtype float32 --enforce-eager --max-model-len 64"
    options += " --max-num-seqs 32 --kv-cache-memory-bytes 33554432 --no-enable-chunked-prefill --seed 0"
    log_path = tmp_path_factory.mktemp("server") / "server.log"
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "TORCHDYNAMO_DISABLE": "1"}
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(theta_1), *options.split()],
            env={**os.environ, **offline, "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_until_it_answers(f"{address}/health", process, log_path)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_it_answers(address: str, process: subprocess.Popen[bytes], log_path: Path) -> None:
    began = time.monotonic()
    while time.monotonic() - began < _STARTS_WITHIN_S and process.poll() is None:
        try:
            with urllib.request.urlopen(address):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"no server:\n{log_path.read_text(errors='replace')[-3000:]}")


def test_a_running_server_is_given_weights_and_answers_like_a_fresh_engine(
    server: str, reference: Stage, theta_1: Path, tmp_path: Path
) -> None:
    """theta_0 (as in `reference`), theta_1, theta_0 again; sampled, so a wrong number shows soon."""
    keeper = EngineKeeper()
    expected = by_key(reference.table())
    config = configuration(engine="vllm_server", server=server, python=None)
    theta_0 = reference.model_dir
    for step, (model, name) in enumerate([(theta_0, "a"), (theta_1, "b"), (theta_0, "a")]):
        stage = replace(
            reference,
            model_dir=model,
            directory=tmp_path / str(step),
            config=config,
            opponent_sha256=name * 64,
            canary_path=canary_of(model, tmp_path / f"{name}.json"),
            keeper=keeper,
        )
        engine = run(stage)[0].notes["engine"]
        assert engine["way"] == "refreshed"
        assert engine["canary_difference"] < 1e-4
        rows = by_key(stage.table())
        same = [rows[key]["generated_ids"] == expected[key]["generated_ids"] for key in expected]
        assert all(same) if model == theta_0 else sum(same) < len(same) / 4, "short ones coincide by chance"
        if model == theta_0:
            for key, row in rows.items():
                assert row["sampler_logps"] == pytest.approx(expected[key]["sampler_logps"], abs=1e-3)
    keeper.close()
