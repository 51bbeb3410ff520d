"""Checkpoints go on where they were, at another layout too; one cut short is never used."""

from __future__ import annotations

import contextlib
import errno
import os
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from nemo_spin.config.schema import OptimConfig
from nemo_spin.errors import DataError
from nemo_spin.megatron.checkpoint_files import checkpoint_path, write_record
from tests.distributed import reference
from tests.distributed.harness import run_ranks
from tests.distributed.megatron.test_engine import _engine

Layout = tuple[int, int, int, bool]


def _steps(engine: Any, table: pa.Table, first: int, last: int) -> list[float]:
    import numpy as np

    from nemo_spin.data.datasets import Units
    from nemo_spin.megatron.forward_step import SPIN_SUMS, spin_loss
    from nemo_spin.objective.objective import build_objective

    units, losses = Units(table), []
    for step in range(first, last):
        indices = np.array([(step * 3 + i) % table.num_rows for i in range(4)])
        loss = partial(spin_loss, objective=build_objective(loss="logistic", beta=1.0))
        losses.append(engine.backward(units, indices, loss=loss, names=SPIN_SUMS)["loss"])
        engine.update(1e-4)  # small enough for rounding not to be amplified from step to step
    return losses


def _save_half_way(
    model_dir: Path, directory: Path, table: pa.Table, layout: Layout, model: dict[str, Any]
) -> list[float]:
    from nemo_spin.megatron.checkpoint import save_checkpoint

    engine, _ = _engine(model_dir, layout, **model)
    losses = _steps(engine, table, 0, 4)
    save_checkpoint(engine, directory, step=4, common={"answer": 42, "nested": [1, "a"]}, keep=2)
    return losses + _steps(engine, table, 4, 8)


def _go_on(
    model_dir: Path, directory: Path, table: pa.Table, layout: Layout, model: dict[str, Any]
) -> list[float]:
    from nemo_spin.megatron.checkpoint import load_checkpoint
    from nemo_spin.megatron.checkpoint_files import latest_checkpoint

    engine, _ = _engine(model_dir, layout, **model)
    path = latest_checkpoint(directory)
    assert path is not None
    assert load_checkpoint(engine, path) == {"answer": 42, "nested": [1, "a"]}
    return _steps(engine, table, 4, 8)


def _pairs() -> pa.Table:
    return reference.with_opponent(reference.make_pairs(9), torch.full((9, 2), -25.0))


SHARED = {"use_distributed_optimizer": True}
LOADED: list[tuple[Layout, dict[str, Any]]] = [
    ((1, 1, 1, False), {}),
    ((1, 2, 1, False), {"virtual_pipeline_model_parallel_size": 2}),
    ((2, 1, 2, True), {}),
    ((2, 1, 2, True), SHARED),
    ((1, 2, 2, False), SHARED),
    ((1, 1, 1, False), {**SHARED, "context_parallel_size": 2}),
]


@pytest.mark.parametrize(
    ("optim", "layout", "settings"),
    [
        ("rmsprop", (2, 2, 1, False), {}),
        ("adam", (2, 1, 2, True), SHARED),
        pytest.param("adam", (2, 2, 1, False), {}, marks=pytest.mark.slow),
        pytest.param("rmsprop", (2, 1, 2, True), SHARED, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_continues_at_any_other_layout(
    tmp_path: Path, optim: str, layout: Layout, settings: dict[str, Any]
) -> None:
    """Saved at TP=2 x PP=2, or at DP=2 with the state shared out; loaded with and without sharing."""
    model_dir, table = reference.make_model(tmp_path / "model", num_hidden_layers=4), _pairs()
    directory, chosen = tmp_path / "checkpoints", {"optim": OptimConfig(name=optim)}
    uninterrupted = run_ranks(_save_half_way, 4, model_dir, directory, table, layout, {**chosen, **settings})
    assert len(set(uninterrupted)) == 8
    for other, others in LOADED:
        ranks = other[0] * other[1] * other[2] * others.get("context_parallel_size", 1)
        losses = run_ranks(_go_on, ranks, model_dir, directory, table, other, {**chosen, **others})
        assert losses == pytest.approx(uninterrupted[4:], rel=1e-5), (other, others)


@pytest.mark.parametrize("optim", ["rmsprop", "adam"])
def test_main_weights_of_bfloat16_continue_to_the_last_bit(tmp_path: Path, optim: str) -> None:
    """The sum of two ranks' gradients is the same number, whether it is shared out or not."""
    model_dir, table, layout = reference.make_model(tmp_path / "model"), _pairs(), (1, 2, 2, False)
    whole = {"optim": OptimConfig(name=optim), "params_dtype": torch.bfloat16}
    shared = {**whole, "use_distributed_optimizer": True}
    directory = tmp_path / "checkpoints"
    uninterrupted = run_ranks(_save_half_way, 4, model_dir, directory, table, layout, shared)
    for settings in (shared, whole):
        losses = run_ranks(_go_on, 4, model_dir, directory, table, layout, settings)
        assert losses == uninterrupted[4:]


def _save_many(model_dir: Path, directory: Path) -> list[str]:
    from nemo_spin.megatron.checkpoint import save_checkpoint
    from nemo_spin.megatron.checkpoint_files import list_checkpoints

    engine, _ = _engine(model_dir, (1, 1, 1, False))
    _steps(engine, reference.with_opponent(reference.make_pairs(4), torch.zeros(4, 2)), 0, 1)
    for step in (5, 10, 15):
        save_checkpoint(engine, directory, step=step, common={}, keep=2)
    return [path.name for path in list_checkpoints(directory)]


def test_only_the_newest_are_kept_and_an_unfinished_one_is_not_seen(tmp_path: Path) -> None:
    model_dir = reference.make_model(tmp_path / "model")
    directory = tmp_path / "checkpoints"
    (directory / "step-00000020.partial").mkdir(parents=True)  # as a kill in the middle of saving leaves it
    assert run_ranks(_save_many, 1, model_dir, directory) == ["step-00000010", "step-00000015"]


def _newest_where_rank_1_cannot_read(directory: Path) -> list[str]:
    """What every rank raises; a stand-in for a storage client that was evicted, by its error alone."""
    from unittest import mock

    from nemo_spin.megatron import checkpoint_files
    from nemo_spin.megatron.runtime import initialize

    runtime = initialize(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, seed=1, timeout_s=60)
    evicted = OSError(errno.EIO, os.strerror(errno.EIO))
    broken = mock.patch.object(checkpoint_files, "sha256_file", side_effect=evicted)
    with broken if runtime.rank == 1 else contextlib.nullcontext():
        try:
            checkpoint_files.newest_whole_checkpoint(directory, runtime=runtime, note=lambda _: None)
        except DataError as error:
            raised = str(error)
    gathered = [""] * runtime.world_size
    torch.distributed.all_gather_object(gathered, raised)
    return gathered


def test_a_checkpoint_that_one_rank_cannot_read_stays_and_ends_all(tmp_path: Path) -> None:
    checkpoint = checkpoint_path(tmp_path, 3)
    checkpoint.mkdir()
    for name in ("a", "b"):
        (checkpoint / name).touch()
    write_record(checkpoint, {})
    messages = run_ranks(_newest_where_rank_1_cannot_read, 2, tmp_path)
    assert all("could not be read (Input/output error)" in message for message in messages)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]


def _load_damaged(model_dir: Path, path: Path) -> str:
    from nemo_spin.errors import CheckpointError
    from nemo_spin.megatron.checkpoint import load_checkpoint

    engine, _ = _engine(model_dir, (1, 1, 1, False))
    try:
        load_checkpoint(engine, path)
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    model_dir = reference.make_model(tmp_path / "model")
    run_ranks(_save_many, 1, model_dir, tmp_path / "checkpoints")
    path = tmp_path / "checkpoints" / "step-00000015"
    (path / ".metadata").write_bytes(b"cut")
    message = run_ranks(_load_damaged, 1, model_dir, path)
    assert str(path) in message and "remedy" in message


def _carried_over(
    model_dir: Path, directory: Path, table: pa.Table, model: dict[str, Any]
) -> tuple[list[float], ...]:
    """Losses of new weights: with the state in memory, with the state that was saved, and with none."""
    from nemo_spin.megatron.checkpoint import load_optimizer_state
    from nemo_spin.megatron.checkpoint_files import latest_checkpoint

    path = latest_checkpoint(directory)
    assert path is not None
    layout = (1, 1, 2, False)
    kept, _ = _engine(model_dir, layout, **model)
    start = [parameter.detach().clone() for parameter in kept.chunks[0].parameters()]
    _steps(kept, table, 0, 4)
    with torch.no_grad():
        for parameter, value in zip(kept.chunks[0].parameters(), start, strict=True):
            parameter.copy_(value)
    in_memory = _steps(kept, table, 4, 8)
    loaded, _ = _engine(model_dir, layout, **model)
    load_optimizer_state(loaded, path)
    from_disk = _steps(loaded, table, 4, 8)
    fresh, _ = _engine(model_dir, layout, **model)
    return in_memory, from_disk, _steps(fresh, table, 4, 8)


@pytest.mark.parametrize("optim", ["rmsprop", "adam"])
def test_optimizer_state_carries_over_to_other_weights(tmp_path: Path, optim: str) -> None:
    model_dir, table, directory = reference.make_model(tmp_path / "model"), _pairs(), tmp_path / "saved"
    model = {"optim": OptimConfig(name=optim), "use_distributed_optimizer": True}
    run_ranks(_save_half_way, 2, model_dir, directory, table, (1, 1, 2, False), model)
    in_memory, from_disk, fresh = run_ranks(_carried_over, 2, model_dir, directory, table, model)
    assert from_disk == in_memory
    assert fresh[0] == from_disk[0], "the weights are not carried over"
    assert fresh[1:] != from_disk[1:]
