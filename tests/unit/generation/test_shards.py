from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_spin.data.columns import GENERATED
from nemo_spin.errors import DataError
from nemo_spin.generation.engine import Answer, Sampling
from nemo_spin.generation.request import Pass, ShardPlan
from nemo_spin.generation.shards import (
    PreparedRows,
    answers_table,
    plan_shards,
    shard_damage,
    sum_logps,
    write_shard,
)
from tests import prepared

PLAN = ShardPlan("train-shard-00001-of-00003.parquet", start=14, rows=4)


@given(st.integers(0, 5000), st.integers(1, 700))
def test_shards_hold_every_row_once(rows: int, shard_rows: int) -> None:
    plans = plan_shards("train", rows, shard_rows)
    assert [row for plan in plans for row in range(plan.start, plan.start + plan.rows)] == list(range(rows))
    assert all(1 <= plan.rows <= shard_rows for plan in plans)
    assert len({plan.file for plan in plans}) == len(plans)


def test_names_are_those_of_the_run_directory() -> None:
    assert [plan.file for plan in plan_shards("heldout", 5, 3)] == [
        "heldout-shard-00000-of-00002.parquet",
        "heldout-shard-00001-of-00002.parquet",
    ]


@pytest.fixture
def rows(tmp_path: Path) -> PreparedRows:
    """40 rows in groups of 16."""
    return PreparedRows(prepared.write(tmp_path / "data", train=prepared.rows(40, seed=1)) / "train.parquet")


@pytest.mark.parametrize(("start", "count"), [(0, 40), (0, 1), (15, 2), (16, 16), (39, 1), (20, 0), (3, 37)])
def test_ranges_of_prepared_rows(rows: PreparedRows, start: int, count: int) -> None:
    expected = prepared.rows(40, seed=1)[start : start + count]
    assert rows.read(start, count)["id"].to_pylist() == [row["id"] for row in expected]
    assert rows.read(start, count)["prompt_ids"].to_pylist() == [row["prompt_ids"] for row in expected]


def test_rows_beyond_the_end_are_refused(rows: PreparedRows) -> None:
    with pytest.raises(DataError, match="40 rows"):
        rows.read(39, 2)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"train\.parquet"):
        PreparedRows(tmp_path / "train.parquet")


def _pass(**overrides: object) -> Pass:
    settings = {
        "name": "train",
        "prepared": "unused",
        "sampling": Sampling(1.0, 1.0, 0, 8, (3,)),
        "num_generations": 2,
        "seed": 1,
        "iteration": 2,
        "opponent_sha256": "a" * 64,
        "shards": (PLAN,),
    }
    return Pass(**{**settings, **overrides})  # type: ignore[arg-type]


def _answers(count: int) -> list[Answer]:
    return [Answer([10 + n, 3], [-0.5 * n, -0.25], "stop") for n in range(count)]


@pytest.fixture
def shard(rows: PreparedRows, tmp_path: Path) -> Path:
    path = tmp_path / PLAN.file
    write_shard(path, answers_table(rows.read(PLAN.start, PLAN.rows), _answers(8), _pass()))
    return path


def test_answers_stand_beside_their_prompts(shard: Path) -> None:
    table = pq.read_table(shard)
    assert table.schema.equals(GENERATED)
    source = prepared.rows(40, seed=1)[14:18]
    for position, row in enumerate(table.to_pylist()):
        assert row == {
            "id": source[position // 2]["id"],
            "sample": position % 2,
            "iteration": 2,
            "prompt_ids": source[position // 2]["prompt_ids"],
            "real_ids": source[position // 2]["real_ids"],
            "generated_ids": [10 + position, 3],
            "finish_reason": "stop",
            "sampler_logps": -0.5 * position - 0.25,
            "num_sampler_tokens": 2,
            "opponent_sha256": "a" * 64,
        }


def test_equal_answers_give_equal_bytes(shard: Path, tmp_path: Path) -> None:
    data = prepared.write(tmp_path / "other", train=prepared.rows(40, seed=1), row_group_size=3)
    rows = PreparedRows(data / "train.parquet").read(PLAN.start, PLAN.rows)
    write_shard(tmp_path / "again.parquet", answers_table(rows, _answers(8), _pass()))
    assert (tmp_path / "again.parquet").read_bytes() == shard.read_bytes()


def test_a_sound_shard_is_sound(shard: Path, rows: PreparedRows) -> None:
    assert shard_damage(shard, PLAN, _pass(), rows) is None


def test_a_shard_of_another_request_is_found_out(shard: Path, rows: PreparedRows) -> None:
    assert "rows" in (shard_damage(shard, PLAN, _pass(num_generations=1), rows) or "")
    assert "iteration" in (shard_damage(shard, PLAN, _pass(iteration=3), rows) or "")
    assert "opponent" in (shard_damage(shard, PLAN, _pass(opponent_sha256="b" * 64), rows) or "")
    assert "prompts" in (shard_damage(shard, ShardPlan(PLAN.file, 15, 4), _pass(), rows) or "")


def test_no_flipped_or_missing_byte_goes_unseen(shard: Path, rows: PreparedRows) -> None:
    """It is found, or (in headers that say nothing about the rows) changes nothing that is read."""
    content = shard.read_bytes()
    sound = pq.read_table(shard)
    found = 0
    for position in range(0, len(content), 3):
        shard.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        if shard_damage(shard, PLAN, _pass(), rows) is None:
            assert pq.read_table(shard).equals(sound), position
        else:
            found += 1
    assert found > len(content) / 3 / 2
    for length in (0, 3, 100, len(content) - 1):
        shard.write_bytes(content[:length])
        assert shard_damage(shard, PLAN, _pass(), rows) is not None, length


def test_other_columns_are_found_out(shard: Path, rows: PreparedRows) -> None:
    pq.write_table(pa.table({"id": ["a"]}), shard)
    assert shard_damage(shard, PLAN, _pass(), rows) == "has other columns"


def test_sums_do_not_depend_on_the_order() -> None:
    logps = [-1e-9, -1e8, -3.0, -1e-9] * 1000
    assert sum_logps(logps) == sum_logps(logps[::-1]) == pytest.approx(-1e11 - 3e3 - 2e-6, abs=1e-4)
