"""One engine, one model after the other: the real vLLM is given new weights, and is watched at it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_spin.data.files import Manifest, read_manifest
from nemo_spin.errors import GateError
from nemo_spin.generation.canary import Canary, CanaryText, write_canary
from nemo_spin.generation.job import SamplerJob
from nemo_spin.generation.keeper import EngineKeeper
from nemo_spin.generation.running import wait
from tests import models, prepared
from tests.functional.generation.harness import Stage


@pytest.fixture(scope="module")
def theta_1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_model(tmp_path_factory.mktemp("models") / "theta_1", seed=1)


@pytest.fixture(scope="module")
def keeper() -> Iterator[EngineKeeper]:
    keeper = EngineKeeper()
    yield keeper
    keeper.close()


def canary_of(model_dir: Path, path: Path) -> Path:
    """What a float64 forward pass of `transformers` says about the first prompts and answers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    texts = []
    for row in prepared.rows(4, seed=1):
        prompt, response = list(row["prompt_ids"]), list(row["real_ids"])  # type: ignore[call-overload]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logps = torch.log_softmax(logits, -1)[torch.arange(len(response)), torch.tensor(response)]
        texts.append(CanaryText(prompt, response, float(logps.sum())))
    write_canary(path, Canary("32", tuple(texts)))
    return path


def run(stage: Stage) -> tuple[Manifest, int]:
    """What it left, and the process that answered."""
    job = stage.start()
    assert isinstance(job, SamplerJob)
    wait(job)
    return stage.finish(job.notes), job.pid


def test_new_weights_in_a_living_engine_answer_like_a_fresh_engine(
    reference: Stage, theta_1: Path, tmp_path: Path, keeper: EngineKeeper
) -> None:
    """theta_1, then theta_0 (which a fresh engine had in `reference`), then theta_1 again.

    Sampled; the bytes of all shards are equal.
    """
    first = Stage(
        theta_1,
        reference.prepared,
        tmp_path / "first",
        opponent_sha256="b" * 64,
        canary_path=canary_of(theta_1, tmp_path / "theta_1.json"),
        keeper=keeper,
    )
    started, pid = run(first)
    assert started.notes["engine"]["way"] == "started"
    canary = canary_of(reference.model_dir, tmp_path / "theta_0.json")
    second = replace(reference, directory=tmp_path / "second", canary_path=canary, keeper=keeper)
    refreshed, same = run(second)
    assert same == pid
    assert refreshed.files == read_manifest(reference.out_dir).files  # type: ignore[union-attr]
    assert refreshed.files != started.files
    assert refreshed.notes["engine"]["way"] == "refreshed"
    for manifest in (started, refreshed):
        assert manifest.notes["engine"]["canary_texts"] == 4
        assert manifest.notes["engine"]["canary_difference"] < 1e-4
    assert refreshed.notes["engine"]["seconds"] < started.notes["engine"]["seconds"] / 3
    assert second.log_path.stat().st_size > 0, "each stage has what was printed on its behalf"

    kept, _ = run(replace(second, directory=tmp_path / "again"))
    assert kept.notes["engine"]["way"] == "kept"
    back, _ = run(replace(first, directory=tmp_path / "back"))
    assert back.notes["engine"]["way"] == "refreshed"
    assert back.files == started.files


@pytest.mark.slow
def test_swapped_weights_are_noticed_before_anything_is_answered(
    theta_1: Path, reference: Stage, tmp_path: Path, keeper: EngineKeeper
) -> None:
    """The living engine is given up; a new one is refused too. (`test_keeping` has it with a stand-in.)"""
    run(Stage(theta_1, reference.prepared, tmp_path / "first", opponent_sha256="b" * 64, keeper=keeper))
    served = shutil.copytree(theta_1, tmp_path / "served")
    wrong = models.write_model(tmp_path / "wrong", seed=2)
    shutil.copy(wrong / "model.safetensors", served / "model.safetensors")
    stage = Stage(
        served,
        reference.prepared,
        tmp_path / "stage",
        opponent_sha256="c" * 64,
        canary_path=canary_of(theta_1, tmp_path / "canary.json"),
        keeper=keeper,
    )
    job = stage.start()
    assert isinstance(job, SamplerJob)
    kept = job.pid
    with pytest.raises(GateError, match=r"(?s)served.*nats per token.*at most 0\.001"):
        wait(job)
    assert job.pid != kept, "the engine of the test before was there"
    (said,) = stage.notes()
    assert "a new one starts" in said
    assert "nats per token" in said
    assert not list(stage.out_dir.glob("*.parquet"))
