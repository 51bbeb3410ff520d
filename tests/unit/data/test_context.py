"""Shares of context-parallel ranks: nothing lost or doubled, and every query sees what it saw before."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_spin.data.context import chunks_by_rank, row_multiple, share_of
from nemo_spin.data.packing import PACKINGS, Layout, Microbatch
from tests.unit.data.test_packing import TWO, lengths, random_units, units_of


def test_a_row_of_two_ranks_by_hand() -> None:
    whole = Layout("shared_prompt", 100, 2, pad_to_multiple=4).collate(units_of(TWO), [0, 1])
    assert whole.input_ids.tolist() == [[5, 6, 8, 2, 11, 2, 7, 9, 10, 2, 2, 0]]
    first, second = (share_of(whole, cp_rank=rank, cp_size=2) for rank in range(2))
    assert first.input_ids.tolist() == [[5, 6, 8, 2, 2, 0]]
    assert second.input_ids.tolist() == [[2, 11, 2, 7, 9, 10]]
    assert second.position_ids.tolist() == [[3, 2, 3, 0, 1, 2]]
    assert first.segments is not None and second.segments is not None
    assert first.segments.tolist() == [
        [0, 2, 0, 0, 0, 2],
        [2, 1, 0, 2, 2, 1],  # the real response [8, 2] begins here
        [3, 1, 6, 1, 7, 3],  # the last query of [9, 10, 2] sees its whole run
        [4, 1, 6, 1, 10, 1],
        [5, 1, 0, 0, 11, 1],
    ]
    assert second.segments.tolist() == [
        [0, 1, 0, 2, 2, 2],
        [1, 2, 0, 2, 4, 2],
        [3, 1, 0, 0, 6, 1],
        [4, 2, 6, 1, 7, 2],
    ]
    assert first.target_ids.tolist() == [8, 2, 11]
    assert first.target_positions.tolist() == [1, 2, 1]
    assert second.target_ids.tolist() == [2, 9, 10, 2, 2]
    assert second.target_responses.tolist() == [1, 2, 2, 2, 3]
    assert first.response_tokens.tolist() == second.response_tokens.tolist() == [2, 2, 3, 1]


def test_early_and_late_chunks_are_held_together() -> None:
    assert chunks_by_rank(3) == [(0, 5), (1, 4), (2, 3)]


@pytest.mark.parametrize(
    ("tp_size", "cp_size", "alignment", "multiple"),
    [
        (1, 1, 1, 1),
        (4, 1, 1, 4),
        (1, 2, 1, 4),
        (2, 2, 1, 4),
        (3, 2, 1, 12),
        (1, 1, 16, 16),
        (2, 1, 32, 64),
        (2, 2, 16, 64),
    ],
)
def test_rows_divide_into_chunks_and_sequence_parallel_shares(
    tp_size: int, cp_size: int, alignment: int, multiple: int
) -> None:
    assert row_multiple(tp_size=tp_size, cp_size=cp_size, alignment=alignment) == multiple


def contexts(share: Microbatch, ids: list[list[int]]) -> list[tuple[int, int, tuple[int, ...]]]:
    """(response, token, ids that its prediction may depend on) of each target; keys are of whole rows."""
    assert share.segments is not None
    found = []
    width = share.input_ids.shape[1]
    for response, token, place in zip(
        share.target_responses.tolist(),
        share.target_ids.tolist(),
        share.target_positions.tolist(),
        strict=True,
    ):
        row, query = divmod(place, width)
        first, count, prefix, prefix_count, run, run_count = next(
            s for s in share.segments.tolist() if s[0] <= query < s[0] + s[1]
        )
        end = run + run_count - (first + count - 1 - query)
        keys = [*range(prefix, prefix + prefix_count), *range(run, end)]
        found.append((response, token, tuple(ids[row][key] for key in keys)))
    return found


@given(
    sizes=st.lists(lengths, min_size=1, max_size=5),
    packing=st.sampled_from(PACKINGS),
    cp_size=st.integers(2, 4),
    tp_size=st.integers(1, 2),
)
def test_all_ranks_together_predict_every_token_from_its_whole_context(
    sizes: list[tuple[int, int, list[int]]], packing: str, cp_size: int, tp_size: int
) -> None:
    units = random_units(sizes)
    multiple = row_multiple(tp_size=tp_size, cp_size=cp_size, alignment=1)
    whole = Layout(packing, 100, 2, pad_to_multiple=multiple).collate(units, range(units.num_units))
    ids = whole.input_ids.tolist()
    shares = [share_of(whole, cp_rank=rank, cp_size=cp_size) for rank in range(cp_size)]
    assert all(share.input_ids.shape[1] % math.lcm(2, tp_size) == 0 for share in shares)
    for share in shares:
        assert share.segments is not None
        queries = [q for first, count, *_ in share.segments.tolist() for q in range(first, first + count)]
        assert queries == list(range(share.input_ids.shape[1])), "without gaps, in order"
    found = sorted(context for share in shares for context in contexts(share, ids))
    responses = [
        (units.prompt(unit).tolist(), response.tolist())
        for unit in range(units.num_units)
        for response in units.responses(unit)
    ]
    expected = sorted(
        (number, token, (*prompt, *response[:place]))
        for number, (prompt, response) in enumerate(responses)
        for place, token in enumerate(response)
    )
    assert found == expected


def test_one_rank_holds_everything() -> None:
    whole = Layout("none", 100, 2).collate(units_of(TWO), [0, 1])
    assert share_of(whole, cp_rank=0, cp_size=1) is whole
