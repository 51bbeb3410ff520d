"""Scoring and one step on real gloo ranks, against `transformers` in float64, at every layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import reference
from tests.distributed.harness import run_ranks

# tensor, pipeline, data parallel, sequence parallel
LAYOUTS = [
    (1, 1, 1, False),
    (2, 1, 1, False),
    (2, 1, 1, True),
    (1, 2, 1, False),
    (1, 1, 2, False),
    (2, 2, 1, False),
    (2, 2, 1, True),
    (2, 1, 2, False),
    (1, 2, 2, True),
]
BETA = 0.7
NUM_ROWS = 7  # no multiple of any batch size: ghosts fill the last microbatch
PACKINGS = ["shared_prompt", "pairs", "none"]


def _engine(
    model_dir: Path,
    layout: tuple[int, int, int, bool],
    params_dtype: torch.dtype = torch.float32,
    *,
    before_wrapping: Any = None,
    **model: Any,
) -> Any:
    """Runs in every rank: the policy, loaded, wrapped for training, with its optimizer."""
    from nemo_spin.bridge.families import architecture_of
    from nemo_spin.bridge.import_hf import load_weights
    from nemo_spin.config.schema import ModelConfig
    from nemo_spin.megatron.engine import Engine, layout_of
    from nemo_spin.megatron.optimizers import build_optimizer, wrap_for_training
    from nemo_spin.megatron.provider import build_model
    from nemo_spin.megatron.runtime import initialize

    tensor, pipeline, _, sequence_parallel = layout
    runtime = initialize(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=model.get("virtual_pipeline_model_parallel_size"),
        context_parallel_size=model.get("context_parallel_size", 1),
        expert_model_parallel_size=model.get("expert_model_parallel_size", 1),
        seed=1,
    )
    config = ModelConfig(
        path=str(model_dir),
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        sequence_parallel=sequence_parallel and tensor > 1,
        **{"micro_batch_tokens": 60, "micro_batch_size": 2, **model},
    )
    config.optim.clip_grad = 0.0
    architecture = architecture_of(model_dir)
    chunks = build_model(architecture, config, params_dtype=params_dtype)
    load_weights(chunks, model_dir, architecture)
    if before_wrapping is not None:
        before_wrapping(chunks, runtime)
    sharded = bool(config.use_distributed_optimizer)
    wrapped = wrap_for_training(chunks, distributed_optimizer=sharded, model=config)
    optimizer = build_optimizer(
        wrapped, config.optim, lr=1e-3, params_dtype=params_dtype, distributed=sharded
    )
    return Engine(wrapped, runtime, architecture.vocab_size, layout_of(config), optimizer), architecture


def _score(
    model_dir: Path, table: pa.Table, layout: tuple[int, int, int, bool], model: dict[str, Any]
) -> list[tuple[float, float]]:
    import numpy as np

    from nemo_spin.data.datasets import Units

    engine, _ = _engine(model_dir, layout, **model)
    units = Units(table)
    scored = engine.score(units, np.arange(units.num_units))
    return [scored[row] for row in range(table.num_rows)]


def _step(
    model_dir: Path,
    table_path: Path,
    out_dir: Path,
    layout: tuple[int, int, int, bool],
    model: dict[str, Any],
) -> dict[str, float]:
    """One backward pass; gradients are written as if they were weights."""
    import numpy as np

    from nemo_spin.bridge.export_hf import export_weights
    from nemo_spin.data.datasets import Units
    from nemo_spin.data.progress import SilentProgress
    from nemo_spin.megatron.forward_step import SPIN_SUMS, spin_loss
    from nemo_spin.objective.objective import build_objective

    engine, architecture = _engine(model_dir, layout, **model)
    units = Units(pq.read_table(table_path))
    everything = np.arange(units.num_units)
    loss = partial(spin_loss, objective=build_objective(loss="logistic", beta=BETA))
    sums = engine.backward(units, everything, loss=loss, names=SPIN_SUMS)
    with torch.no_grad():
        for chunk in engine.chunks:
            for parameter in chunk.parameters():
                parameter.copy_(parameter.main_grad)
    export_weights(
        engine.chunks,
        architecture=architecture,
        source_dir=model_dir,
        out_dir=out_dir,
        dtype=None,
        progress=SilentProgress(),
    )
    return {"loss": sums["loss"] / sums["units"], "units": sums["units"], "correct": sums["correct"]}


def ranks(layout: tuple[int, int, int, bool], model: dict[str, Any]) -> int:
    return layout[0] * layout[1] * layout[2] * int(model.get("context_parallel_size", 1))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.make_model(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_are_those_of_transformers_in_float64(
    llama: Path, layout: tuple[int, int, int, bool], packing: str
) -> None:
    check_scores(llama, layout, packing=packing)


def check_scores(model_dir: Path, layout: tuple[int, int, int, bool], **model: Any) -> None:
    table = reference.make_pairs(NUM_ROWS)
    with torch.no_grad():
        expected = reference.logps(reference.load(model_dir), table)
    scored = run_ranks(_score, ranks(layout, model), model_dir, table, layout, model)
    difference = (torch.tensor(scored, dtype=torch.float64) - expected).abs() / expected.abs()
    assert difference.max() < 1e-5


@pytest.fixture(scope="module")
def step(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A table whose opponent is somewhere else, and the reference's loss and gradients for it."""
    directory = tmp_path_factory.mktemp("step")
    table = reference.make_pairs(NUM_ROWS)
    with torch.no_grad():
        opponent = reference.logps(reference.load(llama), table)
    generator = torch.Generator().manual_seed(0)
    table = reference.with_opponent(table, opponent + torch.randn(opponent.shape, generator=generator))
    pq.write_table(table, directory / "pairs.parquet")
    loss, gradients = reference.spin_step(llama, table, BETA)
    return {"table": directory / "pairs.parquet", "loss": loss, "gradients": gradients}


def check_step(
    step: dict[str, Any],
    model_dir: Path,
    out_dir: Path,
    layout: tuple[int, int, int, bool],
    **model: Any,
) -> None:
    result = run_ranks(_step, ranks(layout, model), model_dir, step["table"], out_dir, layout, model)
    assert result["units"] == step.get("units", NUM_ROWS)
    assert result["loss"] == pytest.approx(step["loss"], rel=1e-5)
    written: dict[str, torch.Tensor] = {}
    for shard in out_dir.glob("*.safetensors"):
        written.update(load_file(shard))
    assert written.keys() == step["gradients"].keys()
    for name, expected in step["gradients"].items():
        difference = (written[name].double() - expected).norm() / expected.norm()
        assert difference < 1e-5, f"{name}: relative difference {difference:.2g}"


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_depend_neither_on_the_layout_nor_on_packing(
    llama: Path, step: dict[str, Any], tmp_path: Path, layout: tuple[int, int, int, bool], packing: str
) -> None:
    check_step(step, llama, tmp_path / "gradients", layout, packing=packing)


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_loss_and_gradients_do_not_depend_on_the_microbatch(
    llama: Path, step: dict[str, Any], tmp_path: Path, micro_batch_size: int
) -> None:
    check_step(
        step,
        llama,
        tmp_path / "gradients",
        (1, 1, 1, False),
        packing="none",
        micro_batch_size=micro_batch_size,
    )


@pytest.mark.parametrize("micro_batch_tokens", [1, 1000])
def test_loss_and_gradients_do_not_depend_on_the_size_of_a_packed_row(
    llama: Path, step: dict[str, Any], tmp_path: Path, micro_batch_tokens: int
) -> None:
    """1: every unit is longer than a row and gets one of its own; 1000: all share one row."""
    check_step(step, llama, tmp_path / "gradients", (2, 1, 1, True), micro_batch_tokens=micro_batch_tokens)


@pytest.mark.parametrize("packing", PACKINGS)
def test_several_generations_of_a_prompt_share_its_weight(llama: Path, tmp_path: Path, packing: str) -> None:
    """Two units, with 3 and 1 generations: the loss is the mean over units of the mean over pairs."""
    table = reference.make_pairs(4)
    first = table.slice(0, 1).to_pylist()[0]
    rows = table.to_pylist()
    for row in rows[:3]:
        row.update(prompt_ids=first["prompt_ids"], real_ids=first["real_ids"])
    table = pa.Table.from_pylist(rows, schema=table.schema)
    table = reference.with_opponent(table, torch.full((4, 2), -21.0, dtype=torch.float64))
    weights = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0], dtype=torch.float64) / 2
    loss, gradients = reference.spin_step(llama, table, BETA, weights)
    table = table.append_column("id", pa.array(["a", "a", "a", "b"])).append_column(
        "iteration", pa.array([0, 0, 0, 0], pa.int32())
    )
    pq.write_table(table, tmp_path / "pairs.parquet")
    step = {"table": tmp_path / "pairs.parquet", "loss": loss, "gradients": gradients, "units": 2}
    check_step(step, llama, tmp_path / "gradients", (1, 2, 1, False), packing=packing)


@pytest.mark.parametrize(
    ("pipeline", "tied", "model"),
    [
        (4, False, {}),
        (4, True, {}),
        (3, True, {"virtual_pipeline_model_parallel_size": 2}),
        (2, False, {"virtual_pipeline_model_parallel_size": 2, "packing": "pairs"}),
        (2, True, {"virtual_pipeline_model_parallel_size": 2, "packing": "none"}),
    ],
    ids=["four-stages", "tied", "interleaved", "two-stages-interleaved", "two-stages-padded"],
)
def test_deep_and_interleaved_pipelines(
    tmp_path: Path, pipeline: int, tied: bool, model: dict[str, Any]
) -> None:
    layers = pipeline * model.get("virtual_pipeline_model_parallel_size", 1)
    model_dir = reference.make_model(tmp_path / "model", num_hidden_layers=layers, tie_word_embeddings=tied)
    table = reference.make_pairs(NUM_ROWS)
    table = reference.with_opponent(table, torch.full((NUM_ROWS, 2), -20.0, dtype=torch.float64))
    pq.write_table(table, tmp_path / "pairs.parquet")
    loss, gradients = reference.spin_step(model_dir, table, BETA)
    step = {"table": tmp_path / "pairs.parquet", "loss": loss, "gradients": gradients}
    check_step(step, model_dir, tmp_path / "gradients", (1, pipeline, 1, False), **model)


def test_recomputation_changes_no_gradient(llama: Path, step: dict[str, Any], tmp_path: Path) -> None:
    check_step(step, llama, tmp_path / "gradients", (1, 2, 1, False), recompute_granularity="full")


@pytest.mark.parametrize("layout", [(1, 1, 1, False), (2, 2, 1, True)])
@pytest.mark.parametrize(
    ("family", "settings"),
    [("qwen3", {}), ("llama", {"tie_word_embeddings": True})],
    ids=["qk-norm", "tied"],
)
def test_norms_on_heads_and_tied_embeddings_get_their_whole_gradient(
    tmp_path: Path, layout: tuple[int, int, int, bool], family: str, settings: dict[str, Any]
) -> None:
    model_dir = reference.make_model(tmp_path / "model", family, **settings)
    table = reference.make_pairs(NUM_ROWS)
    opponent = torch.full((NUM_ROWS, 2), -20.0, dtype=torch.float64)
    table = reference.with_opponent(table, opponent)
    pq.write_table(table, tmp_path / "pairs.parquet")
    loss, gradients = reference.spin_step(model_dir, table, BETA)
    check_step(
        {"table": tmp_path / "pairs.parquet", "loss": loss, "gradients": gradients},
        model_dir,
        tmp_path / "gradients",
        layout,
    )
