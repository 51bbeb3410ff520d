"""A whole training through Lightning and NeMo on real ranks: what it writes, and when it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nemo_spin.data.columns import SCORED
from tests.distributed import reference
from tests.distributed.harness import run_ranks

ROWS, GLOBAL_BATCH, EPOCHS = 10, 4, 2
STEPS = 6  # three steps a pass, the last with two units


def _write_scored(model_dir: Path, directory: Path, *, shift: float) -> None:
    """Pairs scored by the model itself; `shift` moves the opponent's real log-probabilities."""
    table = reference.make_pairs(ROWS)
    with torch.no_grad():
        opponent = reference.logps(reference.load(model_dir), table)
    opponent[:, 0] += shift
    table = reference.with_opponent(table, opponent)
    rest = {
        "id": [f"{i:02d}" for i in range(ROWS)],
        "sample": [0] * ROWS,
        "iteration": [0] * ROWS,
        "finish_reason": ["stop"] * ROWS,
        "sampler_logps": [0.0] * ROWS,
        "num_sampler_tokens": [1] * ROWS,
        "opponent_sha256": [""] * ROWS,
    }
    for name, values in rest.items():
        table = table.append_column(name, pa.array(values, SCORED.field(name).type))
    table = table.select(SCORED.names).cast(SCORED)
    directory.mkdir(parents=True)
    pq.write_table(table, directory / "train-iter_00-shard-00000-of-00001.parquet")
    pq.write_table(table.slice(0, 3), directory / "heldout-iter_00-shard-00000-of-00001.parquet")


def _fit(model_dir: Path, scored: Path, directory: Path, tensor: int, pipeline: int) -> dict[str, Any]:
    from nemo_spin.config.schema import ModelConfig
    from nemo_spin.data.progress import SilentProgress
    from nemo_spin.errors import GateError
    from nemo_spin.megatron.runtime import initialize
    from nemo_spin.model.fit import fit, summary
    from nemo_spin.model.settings import TrainingJob

    runtime = initialize(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, seed=1)
    model = ModelConfig(
        path=str(model_dir),
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        global_batch_size=GLOBAL_BATCH,
    )
    job = TrainingJob(
        opponent=model_dir,
        rows=scored,
        objective="spin",
        spin={"loss": "logistic", "beta": 1.0},
        lr=1e-3,
        epochs=EPOCHS,
        max_steps=None,
        seed=5,
        iteration=0,
        model=model,
        precision="32",
        ln2_tolerance=1e-3,
        directory=directory / "train",
        metrics_path=directory / "metrics.jsonl",
        save_interval=2,
        val_check_interval=None,
        log_every_n_steps=1,
        exp_manager={"create_tensorboard_logger": True},
    )
    try:
        last = fit(job, runtime=runtime, devices=runtime.world_size, num_nodes=1, progress=SilentProgress())
    except GateError as error:
        return {"gate": str(error)}
    return {"last": last.name, **summary(job.metrics_path)}


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_a_training_leaves_metrics_checkpoints_and_tensorboard(
    tmp_path: Path, tensor: int, pipeline: int
) -> None:
    model_dir = reference.make_model(tmp_path / "model")
    _write_scored(model_dir, tmp_path / "scored", shift=0.0)
    result = run_ranks(_fit, 2, model_dir, tmp_path / "scored", tmp_path, tensor, pipeline)
    assert result["last"] == f"step-{STEPS:08d}"
    assert result["steps"] == STEPS
    assert result["first_loss"] == pytest.approx(0.693147, abs=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in train] == list(range(STEPS))
    assert [line["units"] for line in train] == [4, 4, 2, 4, 4, 2]
    assert train[-1]["loss"] < train[0]["loss"] and train[-1]["margin"] > 0
    assert [line["split"] for line in lines][-1] == "heldout"
    assert lines[-1]["units"] == 3
    kept = sorted(path.name for path in (tmp_path / "train" / "checkpoints").iterdir())
    assert kept == [f"step-{STEPS - 2:08d}", f"step-{STEPS:08d}"]
    assert list((tmp_path / "train").rglob("events.out.tfevents*"))


def test_opponent_values_of_another_model_stop_before_the_first_update(tmp_path: Path) -> None:
    model_dir = reference.make_model(tmp_path / "model")
    _write_scored(model_dir, tmp_path / "scored", shift=0.5)
    result = run_ranks(_fit, 1, model_dir, tmp_path / "scored", tmp_path, 1, 1)
    assert "ln 2 gate" in result["gate"] and "remedy" in result["gate"]
    assert not (tmp_path / "train" / "checkpoints").exists()
