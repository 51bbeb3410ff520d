"""The worker's own work, with an engine that answers at once; the real one is in tests/functional."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from nemo_spin.data.progress import SilentProgress
from nemo_spin.errors import GenerationError
from nemo_spin.generation import host, worker
from nemo_spin.generation.engine import Answer, Prompt, Sampling
from nemo_spin.generation.request import EngineSettings, GenerationRequest, Pass
from nemo_spin.generation.seeds import request_seed
from nemo_spin.generation.shards import plan_shards
from nemo_spin.generation.status import StatusReader, StatusWriter
from tests import prepared


class Echo:
    """Answers with the prompt's last token and the end token, and remembers what it was asked."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls: list[tuple[list[Prompt], Sampling]] = []
        self._fail_at = fail_at

    is_new = True
    device = "cpu"
    can_refresh = True

    def answer(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_done: Callable[[int], None]
    ) -> list[Answer]:
        if len(self.calls) == self._fail_at:
            raise RuntimeError("the engine is dead")
        self.calls.append((list(prompts), sampling))
        on_done(len(prompts))
        return [Answer([prompt.token_ids[-1], 3], [-1.0, -0.5], "stop") for prompt in prompts]


@pytest.fixture
def request_of(tmp_path: Path) -> Callable[..., GenerationRequest]:
    data = prepared.write(
        tmp_path / "data", train=prepared.rows(10, seed=1), heldout=prepared.rows(3, seed=2)
    )

    def make(*, max_model_len: int = 100) -> GenerationRequest:
        engine = EngineSettings("vllm", "/model", "float32", 1, max_model_len, 256, None, 512, 300, "a")
        sampling = Sampling(1.0, 1.0, 0, 8, (3,))
        passes = tuple(
            Pass(split, str(data / f"{split}.parquet"), sampling, 2, 7, 4, "a", plan_shards(split, rows, 4))
            for split, rows in (("train", 10), ("heldout", 3))
        )
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        paths = [str(tmp_path / name) for name in ("progress", "status", "log")]
        return GenerationRequest(engine, passes, str(out), *paths, canary=None)

    return make


def _run(request: GenerationRequest, engine: Echo) -> StatusReader:
    steps = StatusWriter(Path(request.status_path))
    worker.run(request, engine=engine, steps=steps, progress=SilentProgress())
    reader = StatusReader(Path(request.status_path))
    reader.poll()
    return reader


def test_each_request_has_its_seed_and_its_room(request_of: Callable[..., GenerationRequest]) -> None:
    engine = Echo()
    _run(request_of(max_model_len=22), engine)
    rows = prepared.rows(10, seed=1)
    prompts = [prompt for prompts, _ in engine.calls[:3] for prompt in prompts]
    assert len(prompts) == 20
    for position, prompt in enumerate(prompts):
        row, sample = rows[position // 2], position % 2
        assert prompt.token_ids == row["prompt_ids"]
        assert prompt.seed == request_seed(7, 4, str(row["id"]), sample)
        assert prompt.max_tokens == min(8, 22 - len(prompt.token_ids))
    assert {prompt.max_tokens for prompt in prompts} > {8}, "the test needs a crowded prompt"


def test_one_engine_serves_all_passes_and_leaves_what_is_there(
    request_of: Callable[..., GenerationRequest], tmp_path: Path
) -> None:
    request = request_of()
    engine = Echo()
    reader = _run(request, engine)
    assert len(engine.calls) == 4
    assert reader.step.name == "heldout-shard-00000-of-00001.parquet"
    out = tmp_path / "out"
    assert len(list(out.glob("*.parquet"))) == 4
    (out / "train-shard-00001-of-00003.parquet").unlink()
    again = Echo()
    _run(request, again)
    assert [prompt.token_ids for prompt in again.calls[0][0]] == [
        row["prompt_ids"] for row in prepared.rows(10, seed=1)[4:8] for _ in range(2)
    ]
    assert len(again.calls) == 1
    assert pq.read_table(out / "train-shard-00001-of-00003.parquet").num_rows == 8


def test_an_engine_that_fails_is_named_with_its_shard(
    request_of: Callable[..., GenerationRequest], tmp_path: Path
) -> None:
    with pytest.raises(GenerationError, match=r"train-shard-00002-of-00003.*engine is dead"):
        _run(request_of(), Echo(fail_at=2))
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 2


@pytest.mark.parametrize(("is_new", "way"), [(True, "started"), (False, "refreshed")])
def test_a_server_that_was_there_is_not_called_started(
    request_of: Callable[..., GenerationRequest], monkeypatch: pytest.MonkeyPatch, is_new: bool, way: str
) -> None:
    request, engine = request_of(), Echo()
    engine.is_new = is_new
    monkeypatch.setattr(host, "open_engine", lambda _settings: engine)
    assert worker.serve(request, host.EngineHost()) == 0
    reader = StatusReader(Path(request.status_path))
    reader.poll()
    assert reader.opened is not None
    assert reader.opened.way == way


def test_an_error_is_handed_to_the_parent(
    request_of: Callable[..., GenerationRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of()
    monkeypatch.setattr(host, "open_engine", lambda _settings: Echo(fail_at=1))
    assert worker.serve(request, host.EngineHost()) == GenerationError.exit_code
    reader = StatusReader(Path(request.status_path))
    reader.poll()
    assert isinstance(reader.error, GenerationError)
    assert "engine is dead" in str(reader.error)


def test_progress_counts_answers(request_of: Callable[..., GenerationRequest], tmp_path: Path) -> None:
    request = request_of()
    updates: list[tuple[int, int]] = []

    class Recording(SilentProgress):
        def update(self, done: int, total: int, unit: str, **values: object) -> None:
            updates.append((done, total))

    steps = StatusWriter(Path(request.status_path))
    worker.run(request, engine=Echo(), steps=steps, progress=Recording())
    assert updates[0] == (0, 26)
    assert updates[-1] == (26, 26)
    assert updates == sorted(updates)


def test_the_worker_imports_nothing_heavy() -> None:
    """Its environment has vLLM, numpy and pyarrow, and not what trains or configures."""
    script = "import json, sys, nemo_spin.generation.worker; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    modules = set(json.loads(output.stdout))
    assert not modules & {
        "omegaconf",
        "hydra",
        "torch",
        "transformers",
        "vllm",
        "megatron",
        "nemo",
        "datasets",
    }
    assert not [name for name in modules if name.startswith(("nemo_spin.config", "nemo_spin.bridge"))]


def test_the_parent_side_imports_nothing_heavy() -> None:
    script = "import json, sys, nemo_spin.evaluate.heldout; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert not set(json.loads(output.stdout)) & {"torch", "transformers", "vllm", "megatron.core", "nemo"}
