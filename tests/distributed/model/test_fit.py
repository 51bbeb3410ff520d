"""A whole training through Lightning and NeMo on real ranks: what it writes, and when it refuses."""

from __future__ import annotations

import itertools
import json
import struct
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nemo_spin.config.schema import GuardsConfig, SchedConfig
from nemo_spin.data.columns import SCORED
from nemo_spin.megatron.learning_rate import learning_rate
from nemo_spin.selfplay.guards import of_training
from tests.distributed import reference
from tests.distributed.harness import run_ranks

ROWS, GLOBAL_BATCH, EPOCHS = 10, 4, 2
STEPS = 6  # three steps a pass, the last with two units


def _write_scored(model_dir: Path, directory: Path, *, shift: float = 0.0) -> None:
    """Pairs scored by the model; `shift` moves the opponent's real log-probabilities."""
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


def _fit(
    model_dir: Path,
    scored: Path,
    directory: Path,
    tensor: int,
    pipeline: int,
    exp_manager: dict[str, Any] | None = None,
    changes: dict[str, Any] | None = None,
    on_step: Callable[..., None] | None = None,
    stop: bool = True,
) -> dict[str, Any]:
    """A training that a gate or guard stops raises: NeMo's OneLogger keeps a span open in its ranks then.

    Without `stop` it goes on whatever guards say; under "errors" is what would have stopped it.
    """
    from nemo_spin.config.schema import Config, ModelConfig
    from nemo_spin.data.progress import SilentProgress
    from nemo_spin.errors import GuardError, PreemptedError
    from nemo_spin.megatron.runtime import initialize
    from nemo_spin.model.fit import fit
    from nemo_spin.model.settings import TrainingJob
    from nemo_spin.model.summary import summary
    from nemo_spin.selfplay.guarding import TrainingWatch

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
        save_top_k=2,
        async_save=False,
        carried=None,
        val_check_interval=None,
        log_every_n_steps=1,
        exp_manager=exp_manager or {"create_tensorboard_logger": True},
        nemo_path=directory / "policy.nemo",
    )
    notes: list[str] = []
    progress = SilentProgress()
    progress.note = notes.append  # type: ignore[method-assign]
    if on_step is not None:
        progress.update = on_step  # type: ignore[method-assign]
    guards = Config()
    guards.selfplay.stop = stop
    guards.selfplay.guards.window_steps = 2
    watch, errors = TrainingWatch(guards, "train", notes.append), list[str]()

    def note_errors(line: dict[str, Any]) -> None:
        try:
            watch(line)
        except GuardError as error:
            errors.append(str(error))

    try:
        last = fit(
            replace(job, **(changes or {})),
            runtime=runtime,
            devices=runtime.world_size,
            num_nodes=1,
            progress=progress,
            started=time.monotonic(),
            watch=watch if stop else note_errors,
        )
    except PreemptedError as error:
        return {"preempted": str(error)}
    return {"last": last.name, "notes": notes, "errors": errors, **summary(job.metrics_path)}


def _check_telemetry(train: list[dict[str, Any]], end: dict[str, Any], result: dict[str, Any]) -> None:
    """Tokens are those of the rows, phases lie inside of the time that passed."""
    rows = reference.make_pairs(ROWS).to_pylist()
    prompts = sum(len(row["prompt_ids"]) for row in rows)
    tokens = prompts + sum(len(row[name]) for row in rows for name in ("real_ids", "generated_ids"))
    assert sum(line["useful_tokens"] for line in train) == result["useful_tokens"] == EPOCHS * tokens
    assert sum(line["packed_slots"] for line in train) == EPOCHS * tokens  # rows without padding
    assert sum(line["saved_prompt_tokens"] for line in train) == EPOCHS * prompts
    assert sum(line["pairs"] for line in train) == result["pairs"] == EPOCHS * ROWS
    for line in train:
        assert line["margin"] == pytest.approx(line["real_rewards"] - line["generated_rewards"], abs=1e-5)
        for player, kind in itertools.product(("policy", "opponent"), ("real", "generated")):
            mean = line[f"{player}_{kind}_logps"] / line[f"{kind}_tokens"]
            assert line[f"{player}_{kind}_logps_per_token"] == pytest.approx(mean)
        assert line["tokens_per_second"] == pytest.approx(line["useful_tokens"] / line["step_seconds"])
        assert line["peak_share"] is None and line["model_tflops"] > 0  # a CPU
        assert line["data_seconds"] > 0 and line["forward_backward_seconds"] > 0
        assert line["optimizer_seconds"] > 0 and line["peak_memory_gib"] > 0.05
    for line in [*train, end]:
        assert 0 < _in_phases(line) <= line["step_seconds"]
    saved = [line["step"] for line in train if line["checkpoint_seconds"] > 0]
    assert saved == [2, 4]  # the lines of the steps after, for save_interval=2
    assert end["checkpoint_seconds"] > 0 and end["evaluation_seconds"] > 0


def _in_phases(line: dict[str, Any]) -> float:
    names = ("data", "forward_backward", "optimizer", "checkpoint", "evaluation", "logging")
    return sum(float(line[f"{name}_seconds"]) for name in names)


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (1, 1)])
def test_a_training_leaves_metrics_checkpoints_and_tensorboard(
    tmp_path: Path, tensor: int, pipeline: int
) -> None:
    model_dir = reference.make_model(tmp_path / "model")
    _write_scored(model_dir, tmp_path / "scored")
    result = run_ranks(_fit, 2, model_dir, tmp_path / "scored", tmp_path, tensor, pipeline)
    assert result["last"] == f"step-{STEPS:08d}"
    assert result["steps"] == STEPS
    assert result["first_loss"] == pytest.approx(0.693147, abs=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in train] == list(range(STEPS))
    assert [line["units"] for line in train] == [4, 4, 2, 4, 4, 2]
    assert train[-1]["loss"] < train[0]["loss"] and train[-1]["margin"] > 0
    assert [line["split"] for line in lines if line["split"] != "train"] == ["start", "heldout", "end"]
    assert lines[-2]["units"] == 3
    _check_telemetry(train, lines[-1], result)
    kept = sorted(path.name for path in (tmp_path / "train" / "checkpoints").iterdir())
    assert kept == [f"step-{STEPS - 2:08d}", f"step-{STEPS:08d}"]
    assert list((tmp_path / "train").rglob("events.out.tfevents*"))
    assert tarfile.is_tarfile(tmp_path / "policy.nemo")


def _fit_with_wandb(model_dir: Path, scored: Path, directory: Path) -> None:
    import wandb

    kwargs = {"project": "selfplay", "name": "tiny", "group": "all", "offline": True}
    loggers = {"create_wandb_logger": True, "wandb_logger_kwargs": kwargs, "create_tensorboard_logger": True}
    _fit(model_dir, scored, directory, 1, 1, loggers)
    wandb.finish()


def _wandb_records(path: Path) -> list[bytes]:
    """What an offline run's file holds: LevelDB's log format behind a header of seven bytes."""
    data, records, position = path.read_bytes(), [b""], 7
    assert data.startswith(b":W&B")
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:  # the end of a block is filled up
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        records[-1] += data[position + 7 : position + 7 + size]
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(b"")
        position += 7 + size
    return records[:-1]


def _wandb_run_and_history(path: Path) -> tuple[Any, list[dict[str, Any]]]:
    """The run and the rows that `wandb sync` would upload."""
    from wandb.proto.wandb_internal_pb2 import Record

    run, rows = None, []
    for data in _wandb_records(path):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "run":
            run = record.run
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    return run, rows


def test_every_logger_is_fed_wandb_too(tmp_path: Path) -> None:
    model_dir = reference.make_model(tmp_path / "model")
    _write_scored(model_dir, tmp_path / "scored")
    run_ranks(_fit_with_wandb, 1, model_dir, tmp_path / "scored", tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = [line["loss"] for line in lines if line["split"] == "train"]
    [path] = (tmp_path / "train").rglob("offline-run-*/*.wandb")
    run, history = _wandb_run_and_history(path)
    assert (run.project, run.display_name, run.run_group) == ("selfplay", "tiny", "all")
    assert run.run_id == (tmp_path / "train" / "wandb_id").read_text()
    assert [row["train/loss"] for row in history if "train/loss" in row] == pytest.approx(expected)
    for name in ("train/tokens_per_second", "train/real_rewards", "train/peak_memory_gib", "heldout/loss"):
        assert any(name in row for row in history), name
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "train" / "logs"))
    board.Reload()
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(expected)


def test_identical_pairs_are_dropped_and_an_early_stop_keeps_the_schedule(tmp_path: Path) -> None:
    model_dir = reference.make_model(tmp_path / "model")
    _write_scored(model_dir, tmp_path / "scored")
    path = tmp_path / "scored" / "train-iter_00-shard-00000-of-00001.parquet"
    rows = pq.read_table(path).to_pylist()
    for row in rows[:3]:  # what the model would answer at its best
        row["generated_ids"], row["opponent_generated_logps"] = row["real_ids"], row["opponent_real_logps"]
    pq.write_table(pa.Table.from_pylist(rows, SCORED), path)
    planned = EPOCHS * 2  # of 7 pairs in batches of 4
    early = {"max_steps": planned - 1}
    result = run_ranks(_fit, 1, model_dir, tmp_path / "scored", tmp_path, 1, 1, None, early)
    assert result["identical_pairs"] == 3 and result["pairs"] == 4 + 3 + 4
    assert result["steps"] == planned - 1 and result["first_loss"] == pytest.approx(0.693147, abs=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [line["lr"] for line in lines if line["split"] == "train"]
    schedule = [
        learning_rate(step, num_steps=planned, peak=1e-3, sched=SchedConfig()) for step in range(planned - 1)
    ]
    assert found == pytest.approx(schedule) and found[-1] > 0


def _fit_to_the_end(tmp_path: Path, **changes: Any) -> tuple[dict[str, Any], set[str]]:
    """A training that no guard stops: its summary, and which guards fired."""
    model_dir = reference.make_model(tmp_path / "model")
    _write_scored(model_dir, tmp_path / "scored")
    result = run_ranks(_fit, 1, model_dir, tmp_path / "scored", tmp_path, 1, 1, None, changes, None, False)
    assert result["steps"] == STEPS, "selfplay.stop=false: it goes on"
    return result, {note.split()[1] for note in result["notes"]}


def test_what_a_collapse_does_to_held_out_pairs(tmp_path: Path) -> None:
    result, fired = _fit_to_the_end(tmp_path, lr=0.3)
    assert "real_fall" in fired and not result["errors"]
    assert "heldout_fall" in {entry.guard for entry in of_training(result, GuardsConfig())}


def test_a_large_beta_saturates_the_margin(tmp_path: Path) -> None:
    result, fired = _fit_to_the_end(tmp_path, spin={"loss": "logistic", "beta": 500.0})
    assert "margin_saturated" in fired and result["margin"] > 10


def test_a_learning_rate_beyond_all_numbers(tmp_path: Path) -> None:
    """It stops with selfplay.stop=false, too: nothing can come of it."""
    result, fired = _fit_to_the_end(tmp_path, lr=1e30)
    assert "not_finite" in fired
    assert result["errors"] and "guard not_finite" in result["errors"][0]
    assert [entry.guard for entry in of_training(result, GuardsConfig())] == ["not_finite"]


def test_a_learning_rate_that_collapses_is_stopped(tmp_path: Path) -> None:
    model_dir = reference.make_model(tmp_path / "model")
    _write_scored(model_dir, tmp_path / "scored")
    stopped = "GuardError: train: guard real_fall: demonstrations became less likely"
    with pytest.raises(AssertionError, match=stopped) as caught:
        run_ranks(_fit, 1, model_dir, tmp_path / "scored", tmp_path, 1, 1, None, {"lr": 0.3})
    assert "selfplay.guards.real_fall.stop=0.5" in str(caught.value) and "spin.lr" in str(caught.value)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["split"] == "train"]
    assert steps[-1] < STEPS - 1, "it ended before its time, and the step that showed it is on file"


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_opponent_values_of_another_model_stop_before_the_first_update(
    tmp_path: Path, precision: str
) -> None:
    model_dir = reference.make_model(tmp_path / "model")
    _write_scored(reference.make_model(tmp_path / "other", initializer_range=0.21), tmp_path / "scored")
    changes = {"precision": precision}
    with pytest.raises(AssertionError, match=r"GateError.*ln 2 gate(.|\n)*remedy"):
        run_ranks(_fit, 1, model_dir, tmp_path / "scored", tmp_path, 1, 1, None, changes)
    assert not (tmp_path / "train" / "checkpoints").exists()
