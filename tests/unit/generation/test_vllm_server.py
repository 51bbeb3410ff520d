"""What is asked of a vLLM server, and what becomes of its answers.

The server is a stand-in that answers from the "weights" it was told to load; the real one is
in tests/functional/generation/test_server.py.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from nemo_spin.errors import GenerationError
from nemo_spin.generation import vllm_server
from nemo_spin.generation.engine import Prompt, Sampling
from nemo_spin.generation.request import EngineSettings
from nemo_spin.generation.vllm_server import VllmServer

SAMPLING = Sampling(temperature=0.5, top_p=0.9, top_k=7, max_tokens=3, stop_token_ids=(2,))


class StandIn(ThreadingHTTPServer):
    """Answers a prompt with its last token and the end, at log-probabilities the weights say."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.silence = threading.Event()
        self.keys: set[str | None] = set()
        self.fails: dict[str, list[int]] = {}  # codes to answer with first; 0: never
        self.weights = ""
        self.replies: dict[str, tuple[int, Any]] = {}  # instead of the usual ones

    def reply(self, path: str, body: dict[str, Any]) -> Any:
        match path:
            case "/v1/models":
                return {"data": [{"id": "the model", "max_model_len": 64}]}
            case "/collective_rpc":
                self.weights = body["kwargs"]["weights_path"]
                return {"results": [None]}
            case "/reset_prefix_cache":
                return {"success": True}
            case "/v1/completions" if "prompt_logprobs" in body:
                entries = [{str(token): {"logprob": -len(self.weights)}} for token in body["prompt"][1:]]
                return {"choices": [{"prompt_logprobs": [None, *entries]}]}
            case "/v1/completions":
                logprobs = {"token_logprobs": [-1.0, -len(self.weights)]}
                tokens = [body["prompt"][-1], 2]
                return {"choices": [{"token_ids": tokens, "finish_reason": "stop", "logprobs": logprobs}]}
            case _:
                return {}


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: dict[str, Any]) -> None:
        self.server.asked.append((self.path, body))
        self.server.keys.add(self.headers["Authorization"])
        failing = self.server.fails.get(self.path)
        if failing:
            code = failing.pop(0)
            if code == 0:
                self.server.silence.wait(1)
                self.close_connection = True
            else:
                self.send_error(code, f"refused {self.headers['Authorization']}")
            return
        code, reply = self.server.replies.get(self.path, (200, self.server.reply(self.path, body)))
        content = json.dumps(reply).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def settings(stand_in: StandIn, model_dir: str = "/m1", max_model_len: int = 64) -> EngineSettings:
    address = f"http://127.0.0.1:{stand_in.server_port}/"
    return EngineSettings(
        "vllm_server", model_dir, "float32", 1, max_model_len, 4, None, 512, 300, "a", address
    )


def connected(stand_in: StandIn, *, max_model_len: int = 64) -> VllmServer:
    return VllmServer(settings(stand_in, max_model_len=max_model_len))


def test_it_is_given_its_weights_before_it_is_asked_and_the_cache_is_emptied(stand_in: StandIn) -> None:
    server = connected(stand_in)
    orders = ["/pause?mode=abort", "/collective_rpc", "/reset_prefix_cache", "/resume"]
    assert [path for path, _ in stand_in.asked] == ["/v1/models", *orders]
    assert stand_in.asked[2][1] == {"method": "reload_weights", "kwargs": {"weights_path": "/m1"}}
    assert server.logps([[5, 6, 7]]) == [[-3, -3]]
    server.refresh(settings(stand_in, "/other"))
    assert [path for path, _ in stand_in.asked][-4:] == orders
    assert server.logps([[5, 6], [7, 8, 9]]) == [[-6], [-6, -6]]


def test_each_prompt_is_a_request_of_its_own_and_answers_are_in_order(stand_in: StandIn) -> None:
    server = connected(stand_in)
    done: list[int] = []
    prompts = [Prompt([9, token], seed=token, max_tokens=3) for token in range(10, 30)]
    answers = server.answer(prompts, SAMPLING, done.append)
    assert [answer.token_ids for answer in answers] == [[token, 2] for token in range(10, 30)]
    assert {tuple(answer.logps) for answer in answers} == {(-1.0, -3.0)}
    assert done == [1] * 20
    asked = [body for path, body in stand_in.asked if path == "/v1/completions"]
    assert sorted(body["seed"] for body in asked) == list(range(10, 30))
    common = {"model": "the model", "temperature": 0.5, "top_p": 0.9, "top_k": 7, "max_tokens": 3}
    common |= {"stop_token_ids": [2], "ignore_eos": True, "logprobs": 0, "return_token_ids": True}
    assert all(body.items() >= common.items() for body in asked)


@pytest.mark.parametrize(
    ("path", "reply", "words"),
    [
        ("/pause?mode=abort", (404, {"detail": "Not Found"}), r"404 Not Found.*VLLM_SERVER_DEV_MODE=1"),
        ("/collective_rpc", (500, {"error": "no such file"}), "no such file"),
        ("/reset_prefix_cache", (200, {"success": False}), "keys and values of the weights it had before"),
    ],
)
def test_a_server_that_does_not_take_weights_is_refused(
    stand_in: StandIn, path: str, reply: tuple[int, Any], words: str
) -> None:
    stand_in.replies[path] = reply
    with pytest.raises(GenerationError, match=rf"(?s){words}"):
        connected(stand_in)


def test_a_server_with_too_short_a_context_is_refused_before_it_is_touched(stand_in: StandIn) -> None:
    with pytest.raises(GenerationError, match=r"(?s)started for 64 tokens.*--max-model-len 65"):
        connected(stand_in, max_model_len=65)
    assert [path for path, _ in stand_in.asked] == ["/v1/models"]


def test_nobody_there(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "_FIRST_WAIT_S", 0.0)
    stand_in.shutdown()
    stand_in.server_close()
    with pytest.raises(GenerationError, match=r"(?s)/v1/models.*refused.*is it up"):
        connected(stand_in)


def test_a_question_is_asked_again_where_the_server_is_busy_or_silent(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(vllm_server.time, "sleep", waits.append)
    stand_in.fails = {"/v1/models": [503], "/v1/completions": [429, 0, 502]}
    server = VllmServer(replace(settings(stand_in), server_timeout_s=0.3))
    (answer,) = server.answer([Prompt([5], 1, 3)], SAMPLING, lambda _: None)
    assert answer.token_ids == [5, 2]
    assert waits == [1.0, 1.0, 2.0, 4.0], "longer each time"
    stand_in.fails = {"/v1/completions": [503] * 9}
    with pytest.raises(GenerationError, match="503"):
        server.answer([Prompt([5], 1, 3)], SAMPLING, lambda _: None)
    assert len(stand_in.fails["/v1/completions"]) == 3
    for path, code in (("/v1/completions", 400), ("/collective_rpc", 503)):  # wrong; done in part, perhaps
        stand_in.fails = {path: [code]}
        with pytest.raises(GenerationError, match=f"{path} was answered by {code}"):
            server.answer([Prompt([5], 1, 3)], SAMPLING, lambda _: None)
            server.refresh(settings(stand_in))


def test_a_key_goes_to_the_server_and_into_no_message(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected(stand_in)
    assert stand_in.keys == {None}
    monkeypatch.setenv("NEMO_SPIN_SERVER_KEY", "sk-secret")
    stand_in.keys.clear()
    connected(stand_in)
    assert stand_in.keys == {"Bearer sk-secret"}
    stand_in.fails = {"/v1/models": [401]}
    with pytest.raises(GenerationError) as caught:
        connected(stand_in)
    assert "401 refused Bearer ***" in str(caught.value)
    assert "NEMO_SPIN_SERVER_KEY" in str(caught.value)
    assert "sk-secret" not in str(caught.value)
    assert "sk-secret" not in repr(settings(stand_in))


@pytest.mark.parametrize("key", ["sk-secret\nsk-second", "sk-secret sk-second", "sk-secret\u20ac"])
def test_a_key_that_no_header_can_hold_is_not_quoted(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("NEMO_SPIN_SERVER_KEY", key)
    with pytest.raises(GenerationError, match="a key is one word of ASCII") as caught:
        connected(stand_in)
    assert "sk-se" not in str(caught.value)
    assert stand_in.keys == set(), "it was not sent"


def test_a_server_that_sends_us_elsewhere_is_refused(stand_in: StandIn) -> None:
    stand_in.fails = {"/v1/models": [302]}
    with pytest.raises(GenerationError, match="answered by 302"):
        connected(stand_in)


def test_answers_are_checked(stand_in: StandIn) -> None:
    server = connected(stand_in)
    unfinished = {"token_ids": [5], "finish_reason": "abort", "logprobs": {"token_logprobs": [-1.0]}}
    stand_in.replies["/v1/completions"] = (200, {"choices": [unfinished]})
    with pytest.raises(GenerationError, match="ended by 'abort'"):
        server.answer([Prompt([5], 1, 3)], SAMPLING, lambda _: None)
