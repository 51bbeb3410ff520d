"""Two iterations of self-play with adapters, stage by stage, against models merged by hand in float64."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_spin.config.load import from_mapping
from nemo_spin.config.schema import Config
from nemo_spin.data.columns import GENERATED
from nemo_spin.data.pairs import training_rows
from tests import prepared
from tests.distributed import reference
from tests.distributed.harness import run_ranks
from tests.distributed.old_listings import only_rank_0_sees

RANK, ALPHA, BETA = 4, 12.0, 0.5
TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PIPELINE = {"pipeline_model_parallel_size": 2}
REPLICAS: dict[str, Any] = {}  # the optimizer is sharded


def _stage(name: str, config: Config, run_dir: Path, iteration: int) -> None:
    """Runs in every rank, as `selfplay/worker.py` does; what the stage before left only rank 0 sees."""
    import importlib

    from nemo_spin.data.progress import SilentProgress
    from nemo_spin.megatron.runtime import initialize
    from nemo_spin.selfplay.ranks.context import StageContext
    from nemo_spin.selfplay.run_directory import RunDirectory
    from nemo_spin.selfplay.worker import STAGES

    runtime = initialize(
        tensor_model_parallel_size=config.model.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.model.pipeline_model_parallel_size,
        seed=config.seed,
        timeout_s=120,
    )
    module, _, function = STAGES[name].partition(":")
    context = StageContext(config, RunDirectory(run_dir), iteration, runtime, SilentProgress(), {})
    with only_rank_0_sees("*-*.parquet", "step-*"):
        getattr(importlib.import_module(module), function)(context)


def _config(model_dir: Path, layout: dict[str, Any]) -> Config:
    return from_mapping(
        {
            "model": {
                "path": str(model_dir),
                "global_batch_size": 4,
                "lora": {"rank": RANK, "alpha": ALPHA, "export_adapter": True},
                **layout,
            },
            "spin": {"beta": BETA, "lr": 1e-3, "epochs": 1, "history": 0, "gates": {"sampler": False}},
            "trainer": {"devices": 2, "precision": "32"},
        }
    )


def _write_generated(directory: Path, rows: list[dict[str, Any]], *, split: str, iteration: int) -> None:
    """Random answers stand in for a sampler's: what an answer is does not matter to what is computed."""
    generator = np.random.default_rng(iteration)
    answers = [
        {
            "id": row["id"],
            "sample": 0,
            "iteration": iteration,
            "prompt_ids": row["prompt_ids"],
            "real_ids": row["real_ids"],
            "generated_ids": generator.integers(4, reference.VOCAB_SIZE, 1 + index % 9).tolist(),
            "finish_reason": "length",
            "sampler_logps": 0.0,
            "num_sampler_tokens": 1 + index % 9,
            "opponent_sha256": "",
        }
        for index, row in enumerate(rows)
    ]
    directory.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(answers, schema=GENERATED)
    pq.write_table(table, directory / f"{split}-shard-00000-of-00001.parquet")


def _merge_by_hand(base: Path, adapter: Path, target: Path) -> Path:
    """A copy of `base` whose weights are W + alpha / r B A; an adapter of two has twice both."""
    shutil.copytree(base, target)
    weights = load_file(base / "model.safetensors")
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, a in tensors.items():
        if ".lora_A." not in name:
            continue
        weight = name.removeprefix("base_model.model.").replace(".lora_A", "")
        b = tensors[name.replace(".lora_A.", ".lora_B.")]
        weights[weight] = (weights[weight].double() + ALPHA / RANK * b.double() @ a.double()).float()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _scored(iteration_dir: Path, model_dir: Path) -> tuple[pa.Table, torch.Tensor]:
    """Held-out rows, and their opponent's values, which must be those of `model_dir`."""
    scored = training_rows(iteration_dir / "scored", "heldout")
    columns = [scored[f"opponent_{kind}_logps"].to_pylist() for kind in ("real", "generated")]
    found = torch.tensor(columns, dtype=torch.float64).T
    with torch.no_grad():
        expected = reference.logps(reference.load(model_dir), scored)
    assert (found - expected).abs().max() < 1e-4, "the opponent is the model merged by hand"
    return scored, found


def test_each_opponent_is_the_model_before_with_its_adapters_merged(tmp_path: Path) -> None:
    """Every stage at another layout than the one before it."""
    theta_0 = reference.make_model(tmp_path / "theta_0")
    rows = {
        split: prepared.rows(count, seed=seed, vocab_size=reference.VOCAB_SIZE)
        for split, count, seed in (("train", 12, 1), ("heldout", 5, 2))
    }
    run_dir = tmp_path / "run"
    prepared.write(run_dir / "data", **rows)
    by_hand = exported = theta_0
    for iteration, layouts in enumerate([(TENSOR, PIPELINE, REPLICAS), (PIPELINE, REPLICAS, TENSOR)]):
        here = run_dir / f"iter_{iteration:02d}"
        for split, content in rows.items():
            _write_generated(here / "generated", content, split=split, iteration=iteration)
        (here / "opponent").symlink_to(exported)
        for stage, layout in zip(("score", "train", "export"), layouts, strict=True):
            run_ranks(_stage, 2, stage, _config(theta_0, layout), run_dir, iteration)
        scored, opponent = _scored(here, by_hand)
        merged = _merge_by_hand(theta_0, here / "adapter", tmp_path / f"merged_{iteration}")
        peft_config = json.loads((here / "adapter" / "adapter_config.json").read_text())
        assert (peft_config["r"], peft_config["lora_alpha"]) == (
            RANK * (iteration + 1),
            ALPHA * (iteration + 1),
        )
        assert peft_config["base_model_name_or_path"] == str(theta_0)
        weights, expected, before = (
            load_file(directory / "model.safetensors") for directory in (here / "model", merged, by_hand)
        )
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6)
        assert sum(not torch.equal(weights[name], before[name]) for name in before) == 2 * 7
        with torch.no_grad():
            gains = reference.logps(reference.load(merged), scored) - opponent
        loss = float(torch.nn.functional.softplus(-BETA * (gains[:, 0] - gains[:, 1])).mean())
        assert abs(loss - math.log(2)) > 1e-3, "something was learned"
        lines = [json.loads(line) for line in (here / "metrics.jsonl").read_text().splitlines()]
        first = next(line for line in lines if line["split"] == "train")
        assert first["step"] == 0 and first["loss"] == pytest.approx(math.log(2), abs=1e-5)
        heldout = next(line for line in lines if line["split"] == "heldout")
        assert heldout["loss"] == pytest.approx(loss, rel=1e-4), "adapters are their merged weights"
        by_hand, exported = merged, here / "model"
