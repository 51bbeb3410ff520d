"""A vLLM server that somebody else started: prompts over HTTP, new weights into it.

The server (verified with vLLM 0.32) has to be started with `VLLM_SERVER_DEV_MODE=1`, which
lets whoever reaches it have any code of the server's called: it belongs on the loopback
interface, or in a network where everybody is trusted. It reads the directories of the run
itself, so both see the same file system.

| step | request |
|---|---|
| stop the answers under way | `POST /pause?mode=abort` |
| other weights | `POST /collective_rpc`, `reload_weights` with the directory |
| keys and values of the old ones | `POST /reset_prefix_cache` |
| go on | `POST /resume` |

Every call has a limit on its time (`generation.server_timeout_s`). Questions are asked again, after a
while, when nobody answered or the server said that it was busy: the same one has the same answer. The
exchange of weights is not. A key, where the server wants one, comes from the environment variable
`NEMO_SPIN_SERVER_KEY`, and goes into requests to that address alone: no file, message or log has it.

Requests that arrive together are computed together, so the last bits of a number may differ
from run to run; with `generation.engine=vllm` they do not. A failed exchange leaves a mixture behind:
the server has to be started anew, by whoever started it.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from nemo_spin.errors import GenerationError, explain
from nemo_spin.generation.answers import checked_answer, unexpected
from nemo_spin.generation.engine import Answer, Prompt, Sampling
from nemo_spin.generation.refresh import PATH_ARGUMENT, RELOAD
from nemo_spin.generation.request import EngineSettings

KEY_VARIABLE = "NEMO_SPIN_SERVER_KEY"
_ATTEMPTS = 6
_FIRST_WAIT_S = 1.0  # doubled each time
# RFC 9110, 15.5.9 and 15.6: a time-out, a bad gateway, a server that is busy; RFC 6585, 4: too many requests.
_BUSY = frozenset({408, 429, 502, 503, 504})


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A key is for one address: nobody is to send us, and it, elsewhere."""

    def redirect_request(self, *_: Any) -> None:
        """Follows none: the answer is taken as a refusal."""


# Servers are inside the cluster: a proxy for the way out does not know them.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)


class VllmServer:
    """A running server, given the weights of a directory; see `engine.Engine`.

    Args:
        settings: `server` is its address.

    Raises:
        GenerationError: It does not answer, has too short a context, or does not take weights.
    """

    is_new = False
    device = "server"
    can_refresh = True

    def __init__(self, settings: EngineSettings) -> None:
        assert settings.server is not None, "relations: a server has an address"
        self._address = settings.server.rstrip("/")
        self._max_num_seqs = settings.max_num_seqs
        self._timeout_s = settings.server_timeout_s
        self._key = _key_of_environment()
        served = self._get("/v1/models")["data"][0]
        self._model = str(served["id"])
        if int(served["max_model_len"]) < settings.max_model_len:
            raise GenerationError(
                explain(
                    f"generation.server={self._address}",
                    found=f"was started for {served['max_model_len']} tokens",
                    rule=f"the longest prompt and its answer have {settings.max_model_len}",
                    remedy=f"start it with --max-model-len {settings.max_model_len}, "
                    "or lower data.max_prompt_length or generation.max_tokens",
                )
            )
        self.refresh(settings)

    def answer(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_done: Callable[[int], None]
    ) -> list[Answer]:
        """See `Engine.answer`; the last bits of a number may depend on what is asked beside it."""
        with ThreadPoolExecutor(self._max_num_seqs) as pool:
            futures = [pool.submit(self._answer_one, prompt, sampling) for prompt in prompts]
            try:
                for future in as_completed(futures):
                    future.result()
                    on_done(1)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [future.result() for future in futures]

    def logps(self, texts: Sequence[list[int]]) -> list[list[float]]:
        """See `Engine.logps`."""
        with ThreadPoolExecutor(self._max_num_seqs) as pool:
            return list(pool.map(self._logps_of, texts))

    def refresh(self, settings: EngineSettings) -> None:
        """See `Engine.refresh`; answers to others' requests are cut.

        Raises:
            GenerationError: The server refused, or still uses keys and values of the old weights.
        """
        self._post("/pause?mode=abort")
        self._post("/collective_rpc", {"method": RELOAD, "kwargs": {PATH_ARGUMENT: settings.model_dir}})
        if self._post("/reset_prefix_cache").get("success") is not True:
            raise unexpected("no word that it gave up keys and values of the weights it had before")
        self._post("/resume")

    def _answer_one(self, prompt: Prompt, sampling: Sampling) -> Answer:
        choice = self._complete(
            prompt.token_ids,
            max_tokens=prompt.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=prompt.seed,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,  # the stop ids say all
            logprobs=0,  # of the drawn token alone
        )
        logps = (choice.get("logprobs") or {}).get("token_logprobs") or []
        return checked_answer(
            choice["token_ids"], logps, choice["finish_reason"], prompt=prompt, sampling=sampling
        )

    def _logps_of(self, text: list[int]) -> list[float]:
        entries = self._complete(text, max_tokens=1, temperature=0.0, prompt_logprobs=0)["prompt_logprobs"]
        if not isinstance(entries, list) or len(entries) != len(text):
            raise unexpected("a prompt without the log-probability of each token")
        return [
            float(entry[str(token)]["logprob"]) for entry, token in zip(entries[1:], text[1:], strict=True)
        ]

    def _complete(self, token_ids: list[int], **settings: Any) -> dict[str, Any]:
        body = {"model": self._model, "prompt": token_ids, "return_token_ids": True, **settings}
        choices = self._post("/v1/completions", body, attempts=_ATTEMPTS)["choices"]
        if len(choices) != 1:
            raise unexpected(f"{len(choices)} answers to one prompt")
        choice: dict[str, Any] = choices[0]
        return choice

    def _get(self, path: str) -> dict[str, Any]:
        return self._send(urllib.request.Request(self._address + path), _ATTEMPTS)

    def _post(self, path: str, body: dict[str, Any] | None = None, *, attempts: int = 1) -> dict[str, Any]:
        data = json.dumps(body or {}).encode()
        headers = {"Content-Type": "application/json"}
        return self._send(urllib.request.Request(self._address + path, data, headers), attempts)

    def _send(self, request: urllib.request.Request, attempts: int) -> dict[str, Any]:
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        for attempt in range(1, attempts + 1):
            try:
                with _OPENER.open(request, timeout=self._timeout_s) as response:
                    content = response.read()
                answer = json.loads(content) if content else {}
                return answer if isinstance(answer, dict) else {}
            except urllib.error.HTTPError as error:
                found = f"{error.code} {error.reason}: {_first_line(error)}"
                if error.code not in _BUSY or attempt == attempts:
                    raise self._refused(request, found) from error
            except (OSError, http.client.HTTPException, ValueError) as error:
                if attempt == attempts:
                    raise self._refused(request, f"{type(error).__name__}: {error}") from error
            time.sleep(_FIRST_WAIT_S * 2.0 ** (attempt - 1))
        raise AssertionError("the last attempt returns or raises")

    def _refused(self, request: urllib.request.Request, found: str) -> GenerationError:
        return GenerationError(
            explain(
                f"generation.server={self._address}",
                found=f"{request.selector} was answered by {self._without_key(found)}"[:300],
                rule="a vLLM server that answers, and takes other weights",
                remedy="is it up, was it started with VLLM_SERVER_DEV_MODE=1, and does it want a key "
                f"({KEY_VARIABLE})? after a failed exchange of weights start it anew",
            )
        )

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _key_of_environment() -> str:
    """The key; empty where there is none.

    Raises:
        GenerationError: No header can hold it. Python's own error would quote it.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if re.fullmatch(r"[!-~]*", key):
        return key
    raise GenerationError(
        explain(
            KEY_VARIABLE,
            found="has a space, a line break or a letter outside of ASCII in it (the key is not shown)",
            rule="a key is one word of ASCII, as it stands in a header of HTTP",
            remedy="set it to the key alone",
        )
    )


def _first_line(error: urllib.error.HTTPError) -> str:
    lines = error.read(2000).decode(errors="replace").strip().splitlines()
    return lines[0] if lines else ""
