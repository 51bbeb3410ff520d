"""Evaluation with the real engine: one session, two passes, texts, a user's scorer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from nemo_spin.config.schema import Config, EvaluationConfig
from nemo_spin.data.files import Manifest, read_manifest, verify_manifest
from nemo_spin.errors import ConfigError
from nemo_spin.evaluate import heldout
from nemo_spin.generation.job import NothingToDo
from tests import prepared
from tests.functional.generation.harness import MAX_TOKENS, STOP_TOKEN_IDS, configuration

SCORER = """
def length(prompt: str, real: str, response: str) -> float:
    assert prompt.startswith("prompt ") and real.startswith("answer ")
    return len(response)

def fail(prompt: str, real: str, response: str) -> float:
    raise KeyError("no such answer")
"""


def _arguments(model_dir: Path, directory: Path, **evaluation: Any) -> tuple[Config, dict[str, Any]]:
    # The iteration's own sampling plays no part: scores of different iterations are compared.
    config = configuration(temperature=[1.0, 0.5], top_p=[0.95, 0.1], shard_rows=5)
    config.evaluation = EvaluationConfig(**{"num_prompts": 11, **evaluation})
    return config, {
        "model_dir": model_dir,
        "prepared": directory / "data",
        "out_dir": directory / "evaluation",
        "iteration": 1,
        "model_sha256": "b" * 64,
        "inputs": {"weights": "b" * 64},
    }


def _running(directory: Path) -> dict[str, Path]:
    return {"progress_path": directory / "progress", "log_path": directory / "evaluate.log"}


@pytest.fixture(scope="module")
def evaluated(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """A directory with an evaluation by the scorer `length`, and its manifest."""
    directory = tmp_path_factory.mktemp("evaluated")
    (directory / "scorer.py").write_text(SCORER)
    prepared.write(directory / "data", heldout=prepared.rows(14, seed=5))
    config, arguments = _arguments(tiny_model, directory, scorer=f"{directory}/scorer.py:length")
    return directory, heldout.evaluate(config, **arguments, **_running(directory))


def test_results_are_means_over_the_answers(evaluated: tuple[Path, Manifest]) -> None:
    directory, manifest = evaluated
    results = json.loads((directory / "evaluation" / "evaluation.json").read_text())
    assert results == manifest.counts
    assert list(results) == ["greedy", "sampled"]
    answers = pq.read_table(directory / "evaluation" / "evaluation.parquet").to_pylist()
    assert [row["id"] for row in answers] == [f"row-5-{n}" for n in range(11)] * 2
    for name in ("sampled", "greedy"):
        rows = [row for row in answers if row["pass"] == name]
        assert all(row["score"] == len(row["response_text"]) for row in rows)
        assert results[name]["score"] == pytest.approx(sum(row["score"] for row in rows) / 11)
        cut = sum(row["finish_reason"] == "length" for row in rows) / 11
        assert results[name]["cut_share"] == pytest.approx(cut)
        assert results[name]["eos_share"] == pytest.approx(1 - cut)
        assert results[name]["prompts"] == 11
    assert (results["sampled"]["temperature"], results["greedy"]["temperature"]) == (1.0, 0.0)


def test_texts_are_the_answers_without_their_end(evaluated: tuple[Path, Manifest], tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    directory, _ = evaluated
    texts = pq.read_table(directory / "evaluation" / "evaluation.parquet").to_pylist()[:11]
    shards = sorted((directory / "evaluation").glob("sampled-shard-*.parquet"))
    ids = [row for shard in shards for row in pq.read_table(shard).to_pylist()]
    for text, row in zip(texts, ids, strict=True):
        body = row["generated_ids"][: -1 if row["finish_reason"] == "stop" else None]
        assert text["response_text"] == tokenizer.decode(body)
    assert {row["finish_reason"] for row in ids} == {"stop", "length"}


def test_greedy_answers_are_those_of_transformers(evaluated: tuple[Path, Manifest], tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    directory, _ = evaluated
    shards = sorted((directory / "evaluation").glob("greedy-shard-*.parquet"))
    for row in (row for shard in shards for row in pq.read_table(shard).to_pylist()):
        with torch.no_grad():
            output = model.generate(
                torch.tensor([row["prompt_ids"]]),
                do_sample=False,
                max_new_tokens=MAX_TOKENS,
                eos_token_id=[prepared.END_TOKEN, *STOP_TOKEN_IDS],
                pad_token_id=0,
            )
        assert row["generated_ids"] == output[0, len(row["prompt_ids"]) :].tolist()


def test_without_its_manifest_it_is_finished_from_the_shards(
    evaluated: tuple[Path, Manifest], tiny_model: Path
) -> None:
    directory, before = evaluated
    out_dir = directory / "evaluation"
    for name in ("manifest.json", "evaluation.json", "evaluation.parquet"):
        (out_dir / name).unlink()
    config, arguments = _arguments(tiny_model, directory, scorer=f"{directory}/scorer.py:length")
    assert isinstance(heldout.start(config, **arguments, **_running(directory)), NothingToDo)
    assert heldout.finish(config, **arguments) == before
    verify_manifest(out_dir, before)


def test_a_scorer_that_fails_is_the_users_mistake(evaluated: tuple[Path, Manifest], tiny_model: Path) -> None:
    directory, _ = evaluated
    config, arguments = _arguments(tiny_model, directory, scorer=f"{directory}/scorer.py:fail")
    with pytest.raises(ConfigError, match="KeyError"):
        heldout.finish(config, **arguments)
    config.evaluation.scorer = f"{directory}/scorer.py:nothing"
    with pytest.raises(ConfigError, match="no function nothing"):
        heldout.start(config, **arguments, **_running(directory))
    assert read_manifest(directory / "evaluation") is not None


def test_without_held_out_data_there_is_nothing_to_evaluate(tiny_model: Path, tmp_path: Path) -> None:
    prepared.write(tmp_path / "data", train=prepared.rows(3, seed=1))
    config, arguments = _arguments(tiny_model, tmp_path)
    with pytest.raises(ConfigError, match=r"data\.heldout"):
        heldout.start(config, **arguments, **_running(tmp_path))
