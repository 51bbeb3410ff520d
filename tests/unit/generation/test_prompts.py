from __future__ import annotations

from pathlib import Path

import pytest

from nemo_spin.errors import DataError
from nemo_spin.generation.prompts import PromptLengths, check_prompts
from tests import prepared


def _data(tmp_path: Path, *prompts: list[int]) -> Path:
    rows = prepared.rows(len(prompts), seed=4)
    for row, ids in zip(rows, prompts, strict=True):
        row["prompt_ids"] = ids
    return prepared.write(tmp_path / "data", train=rows, row_group_size=2) / "train.parquet"


def _check(path: Path, **overrides: int | None) -> PromptLengths:
    settings = {"num_prompts": None, "vocab_size": 100, "max_context": 10, "max_tokens": 4}
    return check_prompts(path, **{**settings, **overrides})  # type: ignore[arg-type]


def test_lengths(tmp_path: Path) -> None:
    path = _data(tmp_path, [5] * 3, [5] * 6, [5] * 7, [5] * 9, [5])
    assert _check(path) == PromptLengths(prompts=5, longest=9, crowded=2)
    assert _check(path, num_prompts=2) == PromptLengths(prompts=2, longest=6, crowded=0)
    assert _check(path, num_prompts=50).prompts == 5


def test_a_prompt_must_leave_room_for_one_token(tmp_path: Path) -> None:
    path = _data(tmp_path, [5] * 9, [5] * 10)
    with pytest.raises(DataError, match=r"row-4-1 with 10 tokens"):
        _check(path)
    assert _check(path, num_prompts=1).prompts == 1
    assert _check(path, max_context=11).longest == 10


def test_an_empty_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row-4-2 with 0 tokens"):
        _check(_data(tmp_path, [5], [6], []))


@pytest.mark.parametrize("bad", [100, 2**31 - 1, -1])
def test_ids_are_in_the_vocabulary(tmp_path: Path, bad: int) -> None:
    path = _data(tmp_path, [99, 0], [5, bad, 6])
    with pytest.raises(DataError, match=str(bad)):
        _check(path)
    assert _check(path, num_prompts=1).prompts == 1


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = _data(tmp_path, [5], [6], [7])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        _check(path)
