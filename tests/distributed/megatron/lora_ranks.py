"""What the ranks of the LoRA tests do; plain functions, pickled by name."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from tests.distributed.megatron.test_engine import BETA, _engine

Layout = tuple[int, int, int, bool]


def lora_engine(model_dir: Path, layout: Layout, lora: dict[str, Any], **model: Any) -> tuple[Any, Any, Any]:
    """The policy with adapters, wrapped for training; its architecture and the LoRA settings."""
    from nemo_spin.config.schema import LoraConfig
    from nemo_spin.megatron import lora as adapters

    settings = LoraConfig(**{"rank": 3, "alpha": 6.0, **lora})

    def attach(chunks: Any, runtime: Any) -> None:
        adapters.attach(chunks, settings, runtime=runtime, seed="7/0")

    engine, architecture = _engine(model_dir, layout, before_wrapping=attach, **model)
    return engine, architecture, settings


def randomise_b(engine: Any) -> None:
    """B is 0 at first, and then A has no gradient: gives B values that do not depend on the layout."""
    from nemo_spin.megatron.lora import all_adapters, initial_a

    for adapters in all_adapters(engine.chunks):
        for name, adapter in adapters.items():
            tp_size = engine.runtime.tp_size if adapters.is_column_parallel else 1
            rows = adapter.b.shape[0] * tp_size
            whole = initial_a(f"b/{adapters.layer}/{name}", rank=rows, columns=adapters.rank)
            rank = engine.runtime.tp_rank if adapters.is_column_parallel else 0
            adapter.b.data.copy_(whole.chunk(tp_size)[rank])


def spin(engine: Any, table: pa.Table, method: str = "backward") -> dict[str, float]:
    """Forward and backward of all rows at once, or evaluation."""
    import numpy as np

    from nemo_spin.data.datasets import Units
    from nemo_spin.megatron.forward_step import SPIN_SUMS, spin_loss
    from nemo_spin.objective.objective import build_objective

    units = Units(table)
    loss = partial(spin_loss, objective=build_objective(loss="logistic", beta=BETA))
    if method == "backward":
        sums = engine.backward(units, np.arange(units.num_units), loss=loss, names=SPIN_SUMS)
    else:
        sums = engine.evaluate(units, batch_units=units.num_units, loss=loss, names=SPIN_SUMS)
    return {"loss": sums["loss"] / sums["units"]}


def step(
    model_dir: Path,
    table: pa.Table,
    out_dir: Path,
    layout: Layout,
    lora: dict[str, Any],
    model: dict[str, Any],
) -> dict[str, Any]:
    """One backward pass: writes adapter/, gradients/ (as if they were adapters) and the merged model/."""
    from nemo_spin.bridge.export_hf import export_weights, verify_export
    from nemo_spin.bridge.export_peft import export_adapter
    from nemo_spin.data.progress import SilentProgress
    from nemo_spin.megatron.lora import all_adapters, merge

    engine, architecture, settings = lora_engine(model_dir, layout, lora, **model)
    randomise_b(engine)
    export = partial(
        export_adapter,
        engine.chunks,
        settings,
        architecture=architecture,
        base=model_dir,
        dtype=torch.float32,
        inputs={},
    )
    export(out_dir=out_dir / "adapter")
    loss = spin(engine, table)["loss"]
    trained = [p for chunk in engine.chunks for p in chunk.parameters() if p.requires_grad]
    kept = [parameter.detach().clone() for parameter in trained]
    for parameter in trained:
        parameter.data.copy_(parameter.main_grad)
    export(out_dir=out_dir / "gradients")
    for parameter, value in zip(trained, kept, strict=True):
        parameter.data.copy_(value)
    before = spin(engine, table, "evaluate")["loss"]
    rounding = merge(engine.chunks)
    assert not list(all_adapters(engine.chunks)), "merging leaves none"
    export_weights(
        engine.chunks,
        architecture=architecture,
        source_dir=model_dir,
        out_dir=out_dir / "model",
        progress=SilentProgress(),
    )
    verify_export(engine.chunks, out_dir / "model", architecture)
    merged = spin(engine, table, "evaluate")["loss"]
    return {"loss": loss, "before": before, "merged": merged, "rounding": rounding}


def first_loss(model_dir: Path, table: pa.Table, layout: Layout, dropout: float) -> float:
    """The loss against what the model itself scores without adapters, before any update."""
    import numpy as np

    from nemo_spin.data.datasets import Units
    from tests.distributed import reference

    scorer, _ = _engine(model_dir, layout)
    scored = scorer.score(Units(table), np.arange(table.num_rows))
    opponent = torch.tensor([scored[row] for row in range(table.num_rows)], dtype=torch.float64)
    engine, _, _ = lora_engine(model_dir, layout, {"dropout": dropout})
    return spin(engine, reference.with_opponent(table, opponent))["loss"]


def masks(model_dir: Path, table: pa.Table, layout: Layout) -> list[list[Any]]:
    """What dropout drew on each rank, forward: in a step, again, in another step, in evaluation."""
    from torch import distributed

    from nemo_spin.megatron.lora import seed_dropout
    from nemo_spin.megatron.lora_layers import Adapters

    engine, _, _ = lora_engine(model_dir, layout, {"dropout": 0.5}, micro_batch_tokens=1000)
    drawn: list[Any] = []
    dropped = Adapters._dropped

    def recorded(adapters: Adapters, inputs: torch.Tensor) -> torch.Tensor:
        result = dropped(adapters, inputs)
        drawn.append((result == 0).tolist())
        return result

    Adapters._dropped = recorded  # type: ignore[method-assign]
    try:
        for number in (0, 0, 1):
            seed_dropout(engine.runtime, f"7/0/{number}")
            spin(engine, table)
        spin(engine, table, "evaluate")
    finally:
        Adapters._dropped = dropped  # type: ignore[method-assign]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, drawn)
    return gathered


def save_half_way(
    model_dir: Path, directory: Path, table: pa.Table, layout: Layout, model: dict[str, Any]
) -> list[float]:
    """Four steps, a checkpoint, four more."""
    from nemo_spin.megatron.checkpoint import save_checkpoint

    engine, _, _ = lora_engine(model_dir, layout, {}, **model)
    losses = _steps(engine, table, 4)
    save_checkpoint(engine, directory, step=4, common={"answer": 42}, keep=1)
    return losses + _steps(engine, table, 4)


def go_on(
    model_dir: Path, directory: Path, table: pa.Table, layout: Layout, model: dict[str, Any]
) -> list[float]:
    """Four steps from the checkpoint; adapters were made with another seed and are overwritten."""
    from nemo_spin.megatron.checkpoint import load_checkpoint
    from nemo_spin.megatron.checkpoint_files import latest_checkpoint

    engine, _, _ = lora_engine(model_dir, layout, {}, **model)
    randomise_b(engine)
    path = latest_checkpoint(directory)
    assert path is not None
    assert load_checkpoint(engine, path) == {"answer": 42}
    return _steps(engine, table, 4)


def _steps(engine: Any, table: pa.Table, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        losses.append(spin(engine, table)["loss"])
        engine.update(1e-3)
    return losses
