"""A training goes on from the newest checkpoint that is whole, and ends with the same weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from nemo_spin.model.summary import summary
from tests.counts import lasting
from tests.distributed import reference
from tests.distributed.harness import run_ranks
from tests.distributed.model.test_fit import STEPS, _fit, _write_scored

LAST, BEFORE = f"step-{STEPS:08d}", f"step-{STEPS - 2:08d}"


def _weights(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, weights and optimizer state; runs in one rank."""
    from megatron.core import dist_checkpointing

    from nemo_spin.megatron.runtime import initialize

    initialize(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, seed=1)
    loaded = dist_checkpointing.load_plain_tensors(str(path))
    return {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}


def _same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    assert any(name.startswith("optimizer.state.") for name in left)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training over two data-parallel ranks: `model`, `scored`, `run`. Do not write into it."""
    place = tmp_path_factory.mktemp("trained")
    reference.make_model(place / "model")
    _write_scored(place / "model", place / "scored", shift=0.0)
    run_ranks(_fit, 2, place / "model", place / "scored", place / "run", 1, 1)
    return place


def _truncate(directory: Path) -> None:
    victim = max(directory.glob("__*"), key=lambda path: path.stat().st_size)
    with victim.open("r+b") as stream:
        stream.truncate(victim.stat().st_size // 2)


def _flip(directory: Path) -> None:
    victim = max(directory.glob("__*"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)


def _remove(directory: Path) -> None:
    (directory / "metadata.json").unlink()


def _lose_record(directory: Path) -> None:
    (directory / "files.json").unlink()


@pytest.mark.parametrize("damage", [_truncate, _flip, _remove, _lose_record])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_goes_on(
    trained: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    checkpoints = tmp_path / "run" / "train" / "checkpoints"
    damage(checkpoints / LAST)
    result = run_ranks(_fit, 2, trained / "model", trained / "scored", tmp_path / "run", 1, 1)
    assert f"{LAST} is damaged" in result["notes"][0] and f"{LAST}.damaged" in result["notes"][0]
    assert result["notes"][1] == f"resuming from {BEFORE}"
    assert sorted(path.name for path in checkpoints.iterdir()) == [BEFORE, LAST, f"{LAST}.damaged"]
    undisturbed = run_ranks(_weights, 1, trained / "run" / "train" / "checkpoints" / LAST)
    assert _same(run_ranks(_weights, 1, checkpoints / LAST), undisturbed)


def _fit_noting_what_is_durable(
    model_dir: Path, scored: Path, directory: Path, *arguments: Any
) -> dict[str, Any]:
    """Under "durable": the steps of metrics.jsonl that a power cut would have left when a checkpoint got
    its name. A file has then the bytes that it had when it was last synced.
    """
    fsync, rename, replace = os.fsync, os.rename, os.replace
    synced: dict[str, bytes] = {}
    durable: dict[str, list[int]] = {}

    def noting_fsync(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        if "metrics.jsonl" in path.name:
            synced[str(path)] = path.read_bytes()

    def noting_replace(old: Any, new: Any) -> None:
        replace(old, new)
        if str(old) in synced:
            synced[str(new)] = synced.pop(str(old))

    def noting_rename(old: Any, new: Any) -> None:
        rename(old, new)
        if not Path(new).name.startswith("step-"):
            return
        lines = map(json.loads, synced.get(str(directory / "metrics.jsonl"), b"").splitlines())
        durable[Path(new).name] = [line["step"] for line in lines if line["split"] == "train"]

    with (
        mock.patch.object(os, "fsync", noting_fsync),
        mock.patch.object(os, "replace", noting_replace),
        mock.patch.object(os, "rename", noting_rename),
    ):
        return {**_fit(model_dir, scored, directory, *arguments), "durable": durable}


def _assert_durable(durable: dict[str, list[int]], steps: list[int]) -> None:
    """Checkpoints after `steps` were published, and no later than the lines of the steps before."""
    assert list(durable) == [f"step-{step:08d}" for step in steps]
    for step, lines in zip(steps, durable.values(), strict=True):
        assert lines[:step] == list(range(step)), "a checkpoint is never newer than the lines"


def test_saving_in_the_background_saves_the_same(trained: Path, tmp_path: Path) -> None:
    changes = {"async_save": True, "save_interval": 1, "save_top_k": STEPS}
    arguments = (trained / "model", trained / "scored", tmp_path / "run", 1, 1, None, changes)
    result = run_ranks(_fit_noting_what_is_durable, 2, *arguments)
    assert result["last"] == LAST
    _assert_durable(result["durable"], list(range(1, STEPS + 1)))
    checkpoints = tmp_path / "run" / "train" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        f"step-{step:08d}" for step in range(1, STEPS + 1)
    ]
    for name in (BEFORE, LAST):  # of the moment of saving, though the weights have moved on since
        undisturbed = run_ranks(_weights, 1, trained / "run" / "train" / "checkpoints" / name)
        assert _same(run_ranks(_weights, 1, checkpoints / name), undisturbed)


def _leave_after_step_3(done: int, total: int, unit: str, **values: Any) -> None:
    """Tells one rank of two, and twice, as impatient schedulers do; the signals are real."""
    if done == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)


def _cut_short(metrics_path: Path) -> Path:
    """Adds a line as a power cut may leave it."""
    with metrics_path.open("a") as stream:
        stream.write('{"split": "train", "st')
    return metrics_path


def _fit_told_while_set_up(*arguments: Any) -> dict[str, Any]:
    """Lightning's own handler is in place by then; it would raise in the rank that was told."""
    from nemo_spin.model.spin_model import MegatronGPTSPINModel

    configure = MegatronGPTSPINModel.configure_model

    def told(model: MegatronGPTSPINModel) -> None:
        configure(model)
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(MegatronGPTSPINModel, "configure_model", told):
        return _fit(*arguments)


def test_ranks_leave_together_after_a_step_and_go_on_from_it(trained: Path, tmp_path: Path) -> None:
    arguments = (trained / "model", trained / "scored", tmp_path / "run", 1, 1, None)
    in_background = {"async_save": True, "save_interval": 1}
    left = run_ranks(_fit_told_while_set_up, 2, *arguments, in_background)
    assert left["preempted"] == f"saved after step 1 of {STEPS}; the same command goes on from there"
    left = run_ranks(_fit, 2, *arguments, in_background, _leave_after_step_3)
    assert left["preempted"] == f"saved after step 3 of {STEPS}; the same command goes on from there"
    checkpoints = tmp_path / "run" / "train" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000002", "step-00000003"]
    metrics_path = _cut_short(tmp_path / "run" / "metrics.jsonl")
    result = run_ranks(_fit_noting_what_is_durable, 2, *arguments)
    _assert_durable(result["durable"], [4, 6])
    said = [note for note in result["notes"] if not note.startswith("guard ")]
    assert said == ["resuming from step-00000003"] and result["last"] == LAST
    assert lasting(summary(metrics_path)) == lasting(summary(trained / "run" / "metrics.jsonl"))
    undisturbed = run_ranks(_weights, 1, trained / "run" / "train" / "checkpoints" / LAST)
    assert _same(run_ranks(_weights, 1, checkpoints / LAST), undisturbed)


def test_a_training_that_was_killed_after_its_last_step_counts_the_same(
    trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    undisturbed = lasting(summary(tmp_path / "run" / "metrics.jsonl"))
    assert {"steps", "pairs", "loss", "heldout_loss", "grad_norm"} <= undisturbed.keys()
    metrics_path = _cut_short(tmp_path / "run" / "metrics.jsonl")
    run_ranks(_fit, 2, trained / "model", trained / "scored", tmp_path / "run", 1, 1)
    assert lasting(summary(metrics_path)) == undisturbed


def _lines(directory: Path, name: str) -> list[float]:
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if line["split"] == "train"]


def test_the_next_iteration_restarts_the_schedule_and_carries_optimizer_state_if_told_to(
    trained: Path, tmp_path: Path
) -> None:
    """Same data but for held-out rows, same seed, same weights: what differs comes from the state."""
    last = trained / "run" / "train" / "checkpoints" / LAST
    no_heldout = shutil.ignore_patterns("heldout-*")
    shutil.copytree(trained / "scored", tmp_path / "scored", ignore=no_heldout)
    arguments = (trained / "model", tmp_path / "scored", tmp_path / "run", 1, 1, None)
    run_ranks(_fit, 2, *arguments, {"carried": last})
    assert _lines(tmp_path / "run", "lr") == _lines(trained / "run", "lr")
    before, carried = _lines(trained / "run", "loss"), _lines(tmp_path / "run", "loss")
    assert carried[0] == before[0], "weights are not carried over"
    assert carried[1:] != before[1:]
    assert "heldout" not in (tmp_path / "run" / "metrics.jsonl").read_text()
