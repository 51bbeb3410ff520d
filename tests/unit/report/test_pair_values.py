from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from nemo_spin.data.files import read_manifest, write_manifest
from nemo_spin.report.pair_values import pair_values
from tests.unit.report.runs import BETA, Shape, Writer


def expected_margins(
    writer: Writer, iteration: int, *, per_token: bool = False
) -> dict[tuple[str, int], float]:
    """beta [(new - old)(real) - (new - old)(generated)], from what the writer was told."""
    found = {}
    for pair in writer.pairs[iteration]["train"]:
        before, after = writer.logps(pair, iteration), writer.logps(pair, iteration + 1)
        sizes = (len(pair["real_ids"]), len(pair["generated_ids"])) if per_token else (1, 1)
        real, generated = ((a - b) / size for a, b, size in zip(after, before, sizes, strict=True))
        found[pair["id"], pair["sample"]] = BETA * (real - generated)
    return found


def test_margins_follow_from_two_scorings(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run", Shape(iterations=3, num_generations=2))
    run = writer.write()
    for iteration in (0, 1):
        table = pair_values(run.parts[iteration], run.parts[iteration + 1]).margins
        assert table is not None
        rows = {(row["id"], row["sample"]): row["margin"] for row in table.to_pylist()}
        assert rows == pytest.approx(expected_margins(writer, iteration))
        assert len(rows) == 80
    assert pair_values(run.parts[2], None).margins is None


def test_margins_of_a_length_normalised_objective_and_none_of_a_mixed_opponent(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run", Shape())
    run = writer.write()
    train = run.parts[0].paths.train
    manifest = read_manifest(train)
    assert manifest is not None
    settings = {**manifest.inputs["config"], "spin.length_normalized": True}
    write_manifest(train, stage="train", files=[], inputs={"config": settings}, counts={})
    table = pair_values(run.parts[0], run.parts[1]).margins
    assert table is not None
    rows = {(row["id"], row["sample"]): row["margin"] for row in table.to_pylist()}
    assert rows == pytest.approx(expected_margins(writer, 0, per_token=True))
    write_manifest(
        train, stage="train", files=[], inputs={"config": {**settings, "spin.opponent_mix": 0.5}}, counts={}
    )
    assert pair_values(run.parts[0], run.parts[1]).margins is None


def test_without_history_the_change_of_demonstrations_is_still_known(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run", Shape(history=0))
    run = writer.write()
    values = pair_values(run.parts[0], run.parts[1])
    assert values.margins is None
    assert set(values.real_changes) == {"train", "heldout"}
    for split, table in values.real_changes.items():
        expected = {
            pair["id"]: writer.logps(pair, 1)[0] - writer.logps(pair, 0)[0] for pair in writer.pairs[0][split]
        }
        found = dict(zip(table["id"].to_pylist(), table["change"].to_pylist(), strict=True))
        assert found == pytest.approx(expected)


def test_lengths_count_every_demonstration_once(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run", Shape(num_generations=3))
    values = pair_values(writer.write().parts[0], None)
    reals = [len(row["real_ids"]) for row in writer.prepared["train"]]
    assert sorted(values.real_lengths["train"]) == sorted(reals)
    assert len(values.generated_lengths["train"]) == 3 * len(reals)


def test_answers_of_earlier_iterations_are_not_counted_again(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run", Shape(iterations=2))
    values = pair_values(writer.write().parts[1], None)
    expected = [writer.logps(pair, 1)[1] / len(pair["generated_ids"]) for pair in writer.pairs[1]["train"]]
    assert np.sort(values.generated_logps_per_token["train"]) == pytest.approx(sorted(expected))


def test_unfinished_stages_are_left_out_and_damage_is_an_error(tmp_path: Path) -> None:
    run = Writer(tmp_path / "run", Shape()).write()
    scored, generated = run.parts[0].paths.scored, run.parts[0].paths.generated
    (scored / "manifest.json").unlink()
    values = pair_values(run.parts[0], run.parts[1])
    assert values.margins is None
    assert values.generated_lengths
    next(generated.glob("train-*.parquet")).write_bytes(b"half a shard")
    with pytest.raises((OSError, pa.ArrowException)):
        pair_values(run.parts[0], run.parts[1])
