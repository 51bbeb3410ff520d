from __future__ import annotations

import math
from pathlib import Path

import pytest

from nemo_spin.errors import GateError
from nemo_spin.generation.canary import Canary, CanaryText, check_difference, read_canary, write_canary

CANARY = Canary("32", (CanaryText([5, 6, 7], [8, 9], -3.0), CanaryText([5], [6, 7, 8, 9], -4.0)))


def test_the_difference_is_the_mean_over_texts_of_the_one_per_response_token() -> None:
    """By hand: the prompt's own tokens do not count; |-3.5 + 3| / 2 = 0.25, |-3.6 + 4| / 4 = 0.1."""
    logps = [[-9.0, -9.0, -1.5, -2.0], [-0.9, -0.9, -0.9, -0.9]]
    assert CANARY.difference(logps) == pytest.approx((0.25 + 0.1) / 2, abs=1e-12)
    exact = [[-9.0, -9.0, -1.5, -1.5], [-1.0, -1.0, -1.0, -1.0]]
    assert CANARY.difference(exact) == 0


def test_differences_of_texts_do_not_cancel() -> None:
    logps = [[0.0, 0.0, -1.0, -1.0], [-1.25, -1.25, -1.25, -1.25]]
    assert CANARY.difference(logps) == pytest.approx((0.5 + 0.25) / 2)


def test_an_engine_is_asked_only_what_it_has_room_for() -> None:
    """A text of five tokens, and the one that the engine draws, take six."""
    assert CANARY.within(6) == CANARY
    assert CANARY.within(5).texts == ()
    longer = Canary("32", (*CANARY.texts, CanaryText([1, 2, 3], [4, 5, 6], 0.0)))
    assert longer.within(6) == CANARY
    assert CANARY.token_ids() == [[5, 6, 7, 8, 9], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize("difference", [0.11, math.nan, math.inf])
def test_a_difference_above_the_tolerance_or_no_number_is_refused(difference: float) -> None:
    with pytest.raises(GateError, match=r"(?s)/model .*nats per token.*at most 0\.1.*generation\.dtype"):
        check_difference("/model", difference, 0.1)
    check_difference("/model", 0.1, 0.1)


def test_a_canary_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_canary(tmp_path / "canary.json", CANARY)
    assert read_canary(tmp_path / "canary.json") == CANARY


@pytest.mark.parametrize(
    "content", [None, "", "[]", "{}", '{"precision": "32", "texts": []}', '{"texts": [1]}']
)
def test_what_is_no_canary_is_none(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "canary.json"
    if content is not None:
        path.write_text(content)
    assert read_canary(path) is None
