"""What an iteration trains on: its own answers and earlier ones, all scored under its opponent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nemo_spin.config.load import from_mapping
from nemo_spin.config.schema import GuardsConfig
from nemo_spin.data.columns import GENERATED
from nemo_spin.data.datasets import Units
from nemo_spin.data.files import read_manifest
from nemo_spin.data.mixture import chosen_ids
from nemo_spin.data.packing import Layout
from nemo_spin.data.pairs import training_rows, with_base
from nemo_spin.megatron.forward_step import SPIN_SUMS, spin_loss
from nemo_spin.objective.objective import build_objective
from nemo_spin.selfplay.guards import of_scores
from nemo_spin.selfplay.run_directory import RunDirectory
from tests.distributed import reference
from tests.distributed.harness import run_ranks
from tests.distributed.old_listings import only_rank_0_sees

PROMPTS, SEED, MIX, BETA = 6, 3, 0.25, 0.5


def _write_generated(run: RunDirectory, iteration: int, sampler: Path) -> None:
    """As a sampler with a model leaves it: the same prompts and demonstrations, other answers, two shards."""
    table = reference.make_pairs(PROMPTS, seed=SEED)
    answers = reference.make_pairs(PROMPTS, seed=SEED + 1 + iteration)["generated_ids"]
    table = table.set_column(2, "generated_ids", answers)
    with torch.no_grad():
        drawn = reference.logps(reference.load(sampler), table)[:, 1].tolist()
    rest: dict[str, list[Any]] = {
        "id": [f"id {row}" for row in range(PROMPTS)],
        "sample": [0] * PROMPTS,
        "iteration": [iteration] * PROMPTS,
        "finish_reason": ["stop"] * PROMPTS,
        "sampler_logps": drawn,
        "num_sampler_tokens": [len(ids) for ids in answers.to_pylist()],
        "opponent_sha256": [f"{iteration}"] * PROMPTS,
    }
    for name, values in rest.items():
        table = table.append_column(name, pa.array(values, GENERATED.field(name).type))
    table = table.select(GENERATED.names).cast(GENERATED)
    directory = run.iteration(iteration).generated
    directory.mkdir(parents=True)
    pq.write_table(table.slice(0, 4), directory / "train-shard-00000-of-00002.parquet")
    pq.write_table(table.slice(4), directory / "train-shard-00001-of-00002.parquet")
    pq.write_table(table.slice(0, 2), directory / "heldout-shard-00000-of-00001.parquet")


def _make_run(path: Path, sampler: Path | None = None) -> RunDirectory:
    """Three iterations that have answered: the opponent, each time another model, or `sampler`."""
    run = RunDirectory(path / "run")
    for iteration in range(3):
        model = reference.make_model(path / f"theta_{iteration}", initializer_range=0.2 + 0.02 * iteration)
        _write_generated(run, iteration, sampler or model)
        run.iteration(iteration).opponent.symlink_to(model)
    return run


def _score(run_dir: Path, tensor: int, spin: dict[str, Any]) -> None:
    from nemo_spin.data.progress import SilentProgress
    from nemo_spin.megatron.runtime import initialize
    from nemo_spin.selfplay.ranks.context import StageContext
    from nemo_spin.selfplay.ranks.score import score

    runtime = initialize(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=1, seed=1)
    config = from_mapping(
        {
            "seed": SEED,
            "model": {"tensor_model_parallel_size": tensor},
            "spin": spin,
            "trainer": {"precision": "32"},
        }
    )
    run = RunDirectory(run_dir)
    for iteration in range(3):
        context = StageContext(config, run, iteration, runtime, SilentProgress(), {"iteration": iteration})
        with only_rank_0_sees("*.parquet"):
            score(context)
            before = _files(context.here.scored)
            score(context)
        assert _files(context.here.scored) == before, "finished shards are kept"


def _files(directory: Path) -> dict[Path, int]:
    """The shards, and which file each is: one written anew is another."""
    return {path: path.stat().st_ino for path in directory.rglob("*.parquet")}


def _reference(run: RunDirectory, theta: int, rows: pa.Table) -> torch.Tensor:
    with torch.no_grad():
        return reference.logps(reference.load(run.iteration(theta).opponent), rows)


def _assert_equal(rows: pa.Table, kind: str, expected: torch.Tensor) -> None:
    for column, response in enumerate(("real", "generated")):
        found = torch.tensor(rows[f"{kind}_{response}_logps"].to_pylist(), dtype=torch.float64)
        torch.testing.assert_close(found, expected[:, column], rtol=1e-5, atol=1e-4)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = _make_run(tmp_path_factory.mktemp("mixed"))
    run_ranks(_score, 2, run.path, 2, {"history": 1, "opponent_mix": MIX})
    return run


def test_history_1_is_exactly_the_rows_of_two_iterations_under_the_newest(scored: RunDirectory) -> None:
    for iteration, ages in ((0, [0]), (1, [0, 1]), (2, [1, 2])):
        rows = training_rows(scored.iteration(iteration).scored, "train")
        expected = pa.concat_tables(
            pq.read_table(path, partitioning=None)
            for number in ages
            for path in sorted(scored.iteration(number).generated.glob("train-*.parquet"))
        )
        assert rows.select(GENERATED.names).cast(GENERATED).equals(expected)
        _assert_equal(rows, "opponent", _reference(scored, iteration, rows))
        heldout = training_rows(scored.iteration(iteration).scored, "heldout")
        assert heldout["iteration"].to_pylist() == [iteration] * 2


def _findings(run: RunDirectory, iteration: int) -> list[tuple[str, str]]:
    manifest = read_manifest(run.iteration(iteration).scored)
    assert manifest is not None
    return [(entry.guard, entry.level) for entry in of_scores(manifest.counts, GuardsConfig())]


def test_a_sampler_with_other_weights(scored: RunDirectory, tmp_path: Path) -> None:
    other = reference.make_model(tmp_path / "other", initializer_range=0.4)
    run = _make_run(tmp_path, sampler=other)
    run_ranks(_score, 1, run.path, 1, {"gates": {"sampler": False}})
    assert _findings(run, 1) == [("sampler_difference", "warn")] and _findings(scored, 1) == []
    with pytest.raises(AssertionError, match=r"GateError: sampler gate .* differ by"):
        run_ranks(_score, 1, _make_run(tmp_path / "gated", sampler=other).path, 1, {})


def test_theta_0_has_scored_every_row_once(scored: RunDirectory) -> None:
    for iteration, bases in ((1, [0, 1]), (2, [1, 2])):
        directories = [scored.iteration(number).base for number in bases]
        for split in ("train", "heldout"):
            rows = training_rows(scored.iteration(iteration).scored, split)
            rows = with_base(rows, directories, split)
            _assert_equal(rows, "base", _reference(scored, 0, rows))
    files = [len(list(scored.iteration(number).scored.rglob("base/train-*.parquet"))) for number in range(3)]
    assert files == [0, 2, 2], "those of iteration 0 are its opponent's own; each shard once"


def test_the_loss_of_a_mixed_opponent(scored: RunDirectory) -> None:
    rows = training_rows(scored.iteration(1).scored, "train")
    rows = with_base(rows, [scored.iteration(number).base for number in (0, 1)], "train")
    units = Units(rows)
    microbatch = Layout("shared_prompt", 10_000, 4).collate(units, range(units.num_units))
    objective = build_objective(loss="logistic", beta=BETA, opponent_mix=MIX)
    logps = microbatch.opponent_logps.float()  # the policy as it starts
    _, _, sums = spin_loss(microbatch, logps, objective=objective)
    policy, base = (_reference(scored, theta, rows).numpy() for theta in (1, 0))
    gains = policy - ((1 - MIX) * policy + MIX * base)
    margins = BETA * (gains[:, 0] - gains[:, 1])
    found = dict(zip(SPIN_SUMS, sums.tolist(), strict=True))
    assert np.abs(margins).max() > 0.01, "theta_0 counts"
    assert found["margin"] == pytest.approx(margins.sum(), abs=1e-3)
    assert found["loss"] == pytest.approx(np.log1p(np.exp(-margins)).sum(), abs=1e-3)
    assert found["start_loss"] == pytest.approx(found["loss"], abs=1e-6)


def test_a_mixture_takes_a_seeded_part_of_each_age(tmp_path: Path) -> None:
    run = _make_run(tmp_path)
    run_ranks(_score, 1, run.path, 1, {"history": 2, "mixture": [0.5, 2, 0]})
    every = [f"id {row}" for row in range(PROMPTS)]
    for iteration, amounts in ((0, {0: 0.5}), (1, {1: 0.5, 0: 2}), (2, {2: 0.5, 1: 2})):
        rows = training_rows(run.iteration(iteration).scored, "train")
        for number, amount in amounts.items():
            own = rows.filter(pa.compute.equal(rows["iteration"], number))["id"].to_pylist()
            expected = chosen_ids(pa.chunked_array([every]), amount, seed=(SEED, iteration, number))
            assert own == expected.to_pylist()
        assert rows.num_rows == sum({0.5: 3, 2: 2}[amount] for amount in amounts.values())
        assert training_rows(run.iteration(iteration).scored, "heldout").num_rows == 2
