"""One engine, one model after the other: the real vLLM is given new weights, and is watched at it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_spin.data.files import read_manifest
from nemo_spin.errors import GateError
from nemo_spin.generation.canary import Canary, CanaryText, write_canary
from nemo_spin.generation.job import SamplerJob, wait
from nemo_spin.generation.keeper import EngineKeeper
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


def test_new_weights_in_a_living_engine_answer_like_a_fresh_engine(
    reference: Stage, tiny_model: Path, theta_1: Path, tmp_path: Path, keeper: EngineKeeper
) -> None:
    """Both ways there (theta_0 to theta_1, and back), sampled; the bytes of all shards are equal."""
    canary = canary_of(theta_1, tmp_path / "canary.json")
    common = {"model_dir": theta_1, "prepared": reference.prepared, "opponent_sha256": "b" * 64}
    fresh = Stage(directory=tmp_path / "fresh", canary_path=canary, **common)  # type: ignore[arg-type]
    fresh.run()

    first = Stage(tiny_model, reference.prepared, tmp_path / "first", keeper=keeper)
    process = first.start()
    assert isinstance(process, SamplerJob)
    wait(process)
    first.finish(process.notes)
    second = Stage(directory=tmp_path / "second", canary_path=canary, keeper=keeper, **common)  # type: ignore[arg-type]
    refreshed = second.start()
    assert isinstance(refreshed, SamplerJob)
    assert refreshed.pid == process.pid
    wait(refreshed)
    manifest = second.finish(refreshed.notes)

    assert manifest.files == read_manifest(fresh.out_dir).files  # type: ignore[union-attr]
    assert manifest.files != read_manifest(reference.out_dir).files  # type: ignore[union-attr]
    engine = manifest.notes["engine"]
    assert engine["way"] == "refreshed"
    assert engine["canary_texts"] == 4
    assert engine["canary_difference"] < 1e-4
    restarted = read_manifest(fresh.out_dir).notes["engine"]  # type: ignore[union-attr]
    assert restarted["way"] == "started"
    assert restarted["canary_difference"] < 1e-4
    assert engine["seconds"] < restarted["seconds"] / 3
    assert second.log_path.stat().st_size > 0, "each stage has what was printed on its behalf"

    again = replace(second, directory=tmp_path / "again")
    assert again.run().notes["engine"]["way"] == "kept"
    back = replace(first, directory=tmp_path / "back")
    manifest = back.run()
    assert manifest.notes["engine"]["way"] == "refreshed"
    assert manifest.files == read_manifest(reference.out_dir).files  # type: ignore[union-attr]


def test_swapped_weights_are_noticed_before_anything_is_answered(
    theta_1: Path, reference: Stage, tmp_path: Path, keeper: EngineKeeper
) -> None:
    """The living engine is given up; a new one is refused too."""
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
