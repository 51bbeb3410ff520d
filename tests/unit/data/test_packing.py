"""Microbatches: what is packed, what is a target, and that nothing is lost or doubled."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_spin.data.datasets import REAL_ONLY, Units
from nemo_spin.data.packing import PACKINGS, Layout, Microbatch, of_one_shape, pack, pack_for_ranks, spread

IDS = pa.list_(pa.int32())


def units_of(rows: list[tuple[str, list[int], list[int], list[int]]]) -> Units:
    """Rows of (id, prompt, real, generated)."""
    count = len(rows)
    return Units(
        pa.table(
            {
                "id": pa.array([row[0] for row in rows]),
                "iteration": pa.array([0] * count, pa.int32()),
                "prompt_ids": pa.array([row[1] for row in rows], IDS),
                "real_ids": pa.array([row[2] for row in rows], IDS),
                "generated_ids": pa.array([row[3] for row in rows], IDS),
                "opponent_real_logps": pa.array([-1.0 * (i + 1) for i in range(count)]),
                "opponent_generated_logps": pa.array([-10.0 * (i + 1) for i in range(count)]),
            }
        )
    )


TWO = [("a", [5, 6], [8, 2], [11, 2]), ("b", [7], [9, 10, 2], [2])]


def layout(packing: str, *, tokens: int = 100, multiple: int = 1) -> Layout:
    return Layout(packing, tokens, micro_batch_size=2, pad_to_multiple=multiple)


def test_shared_prompt_row_by_hand() -> None:
    batch = layout("shared_prompt").collate(units_of(TWO), [0, 1])
    assert batch.input_ids.tolist() == [[5, 6, 8, 2, 11, 2, 7, 9, 10, 2, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 0, 1, 2, 3, 1]]
    assert batch.segments is not None
    assert batch.segments.tolist() == [
        [0, 2, 0, 0, 0, 2],
        [2, 2, 0, 2, 2, 2],
        [4, 2, 0, 2, 4, 2],
        [6, 1, 0, 0, 6, 1],
        [7, 3, 6, 1, 7, 3],
        [10, 1, 6, 1, 10, 1],
    ]
    # the prompt's last token predicts the first token of both responses
    assert batch.target_positions.tolist() == [1, 2, 1, 4, 6, 7, 8, 6]
    assert batch.target_ids.tolist() == [8, 2, 11, 2, 9, 10, 2, 2]
    assert batch.target_responses.tolist() == [0, 0, 1, 1, 2, 2, 2, 3]
    assert batch.response_tokens.tolist() == [2, 2, 3, 1]
    assert batch.opponent_logps.tolist() == [-1.0, -10.0, -2.0, -20.0]
    assert batch.pair_real.tolist() == [0, 2] and batch.pair_generated.tolist() == [1, 3]


def test_a_unit_of_three_rows_has_its_real_response_once() -> None:
    rows = [("a", [5], [8, 2], [11, 2]), ("a", [5], [8, 2], [12, 2]), ("a", [5], [8, 2], [2])]
    units = units_of([*rows, ("b", [6], [9, 2], [2])])
    assert units.num_units == 2 and units.rows(0) == range(3)
    batch = layout("shared_prompt").collate(units, [0, 1])
    assert batch.input_ids.tolist() == [[5, 8, 2, 11, 2, 12, 2, 2, 6, 9, 2, 2]]
    assert batch.pair_real.tolist() == [0, 0, 0, 4] and batch.pair_generated.tolist() == [1, 2, 3, 5]
    assert batch.pair_units.tolist() == [0, 0, 0, 1]
    assert batch.opponent_logps.tolist() == [-1.0, -10.0, -20.0, -30.0, -4.0, -40.0]


def test_the_same_id_in_another_iteration_is_another_unit() -> None:
    table = pa.table(
        {
            "id": ["a", "a"],
            "iteration": pa.array([0, 1], pa.int32()),
            "prompt_ids": pa.array([[1], [1]], IDS),
            "real_ids": pa.array([[2], [2]], IDS),
            "generated_ids": pa.array([[3], [4]], IDS),
        }
    )
    assert Units(table).num_units == 2


def test_padded_sequences_by_hand() -> None:
    batch = layout("none").collate(units_of(TWO), [0, 1])
    assert batch.segments is None
    assert batch.input_ids.tolist() == [[5, 6, 8, 2], [5, 6, 11, 2], [7, 9, 10, 2], [7, 2, 0, 0]]
    flat = batch.input_ids.flatten()
    assert torch.equal(flat[batch.target_positions + 1], batch.target_ids)


def test_plain_fine_tuning_has_units_of_one_response() -> None:
    table = pa.table({"prompt_ids": pa.array([[1], [2, 3]], IDS), "real_ids": pa.array([[5], [6]], IDS)})
    batch = layout("shared_prompt").collate(Units(table, REAL_ONLY), [1, 0])
    assert batch.input_ids.tolist() == [[2, 3, 6, 1, 5]]
    assert batch.unit_real.tolist() == [0, 1] and batch.pair_real.tolist() == []


def test_rows_of_a_slice_of_a_larger_table_are_its_own() -> None:
    table = pa.table(
        {"prompt_ids": pa.array([[1], [2, 3], [4]], IDS), "real_ids": pa.array([[5], [6], [7]], IDS)}
    )
    units = Units(table.slice(1), REAL_ONLY)
    assert units.prompt(0).tolist() == [2, 3] and units.responses(0)[0].tolist() == [6]
    assert units.token_counts().tolist() == [[2, 1, 1], [1, 1, 1]]


lengths = st.tuples(st.integers(1, 9), st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=3))


def random_units(sizes: list[tuple[int, int, list[int]]]) -> Units:
    rows, token = [], 0
    for number, (prompt, real, generated) in enumerate(sizes):
        first = list(range(token, token + prompt + real))
        token += prompt + real
        for size in generated:
            rows.append((f"{number:03d}", first[:prompt], first[prompt:], list(range(token, token + size))))
            token += size
    return units_of(rows)


def visible(batch: Microbatch) -> list[list[int]]:
    """For each response token, the ids that its prediction may depend on, in order of position."""
    ids = batch.input_ids.flatten().tolist()
    row_length = batch.input_ids.shape[1]
    seen = []
    for position in batch.target_positions.tolist():
        if batch.segments is None:
            start = position // row_length * row_length
            keys = list(range(start, position + 1))
        else:
            segments = batch.segments.tolist()
            first, _, prefix, count, *_ = next(s for s in segments if s[0] <= position < s[0] + s[1])
            keys = [*range(prefix, prefix + count), *range(first, position + 1)]
        seen.append([ids[key] for key in keys])
    return seen


@given(sizes=st.lists(lengths, min_size=1, max_size=6), multiple=st.sampled_from([1, 2, 4]))
def test_every_packing_predicts_the_same_tokens_from_the_same_contexts(
    sizes: list[tuple[int, int, list[int]]], multiple: int
) -> None:
    units = random_units(sizes)
    batches = {
        packing: layout(packing, multiple=multiple).collate(units, range(units.num_units))
        for packing in PACKINGS
    }
    contexts = {packing: visible(batch) for packing, batch in batches.items()}
    assert contexts["shared_prompt"] == contexts["pairs"] == contexts["none"]
    targets = {tuple(batch.target_ids.tolist()) for batch in batches.values()}
    assert len(targets) == 1
    for packing, batch in batches.items():
        assert batch.input_ids.shape[1] % multiple == 0
        if batch.segments is not None:
            covered = [p for first, count, *_ in batch.segments.tolist() for p in range(first, first + count)]
            assert covered == list(range(batch.num_slots)), packing


@given(
    sizes=st.lists(lengths, min_size=1, max_size=12),
    packing=st.sampled_from(PACKINGS),
    dp_size=st.integers(1, 4),
    tokens=st.integers(1, 60),
)
def test_ranks_share_a_batch_without_loss_or_repetition(
    sizes: list[tuple[int, int, list[int]]], packing: str, dp_size: int, tokens: int
) -> None:
    units, how = random_units(sizes), layout(packing, tokens=tokens)
    indices = np.random.default_rng(0).permutation(units.num_units)
    shares = [how.microbatches(units, indices, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    assert all(shares), "every rank runs at least one microbatch"
    seen = [unit for share in shares for microbatch in share for unit in microbatch if unit >= 0]
    assert sorted(seen) == list(range(units.num_units))
    for microbatch in (m for share in shares for m in share if packing != "none" and m != [-1]):
        used = how.unit_tokens(units, np.array(microbatch)).sum()
        assert used <= tokens or len(microbatch) == 1


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_ghost_has_weight_zero_and_no_row(packing: str) -> None:
    batch = layout(packing).collate(units_of(TWO), [0, -1])
    assert batch.unit_weights.tolist() == [1.0, 0.0]
    assert batch.unit_rows == (range(1), range(0))


@given(sizes=st.lists(st.lists(lengths, min_size=1, max_size=3), min_size=1, max_size=4))
@pytest.mark.parametrize("packing", PACKINGS)
def test_microbatches_of_one_shape_predict_what_they_did(
    packing: str, sizes: list[list[tuple[int, int, list[int]]]]
) -> None:
    before = []
    for chosen in sizes:
        units = random_units(chosen)
        before.append(layout(packing, multiple=2).collate(units, range(units.num_units)))
    after = of_one_shape(before)
    num_rows, length = (max(batch.input_ids.shape[axis] for batch in before) for axis in (0, 1))
    for old, new in zip(before, after, strict=True):
        assert new.input_ids.shape == new.position_ids.shape == (num_rows, length)
        assert visible(new) == visible(old)
        flat = new.position_ids.flatten()[new.target_positions]
        assert torch.equal(flat, old.position_ids.flatten()[old.target_positions])
        if new.segments is not None:
            queries = [q for first, count, *_ in new.segments.tolist() for q in range(first, first + count)]
            assert queries == list(range(length))


@given(sizes=st.lists(st.integers(1, 50), max_size=60), capacity=st.integers(1, 60))
def test_bins_hold_everything_once_and_are_at_least_half_full_on_average(
    sizes: list[int], capacity: int
) -> None:
    bins = pack(np.array(sizes, dtype=np.int64), capacity)
    assert sorted(item for chosen in bins for item in chosen) == list(range(len(sizes)))
    loads = [sum(sizes[item] for item in chosen) for chosen in bins]
    assert all(load <= capacity or len(chosen) == 1 for load, chosen in zip(loads, bins, strict=True))
    # no two bins could be one
    smallest = sorted(loads)[:2]
    assert len(smallest) < 2 or sum(smallest) > capacity


def test_a_batch_that_fits_one_row_is_shared_by_all_ranks() -> None:
    units, how = random_units([(4, 3, [3])] * 8), layout("shared_prompt", tokens=1000)
    for rank in range(4):
        (microbatch,) = how.microbatches(units, np.arange(8), dp_rank=rank, dp_size=4)
        assert len(microbatch) == 2


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    capacity=st.integers(1, 60),
    num_ranks=st.integers(1, 4),
)
def test_bins_for_ranks_hold_everything_once_within_the_capacity(
    sizes: list[int], capacity: int, num_ranks: int
) -> None:
    array = np.array(sizes)
    bins = pack_for_ranks(array, capacity, num_ranks)
    assert sorted(item for chosen in bins for item in chosen) == list(range(len(sizes)))
    assert all(array[chosen].sum() <= capacity or len(chosen) == 1 for chosen in bins)
    assert len(bins) <= -(-len(pack(array, capacity)) // num_ranks) * num_ranks


@given(sizes=st.lists(st.integers(1, 50), max_size=40), num_ranks=st.integers(1, 6))
def test_shares_of_ranks_differ_by_at_most_one_bin(sizes: list[int], num_ranks: int) -> None:
    shares = spread(sizes, num_ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(sizes)))
    loads = [sum(sizes[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0)
