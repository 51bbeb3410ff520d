"""Microbatches: what is padded, what is a target, and that batching moves no row."""

import numpy as np
import pyarrow as pa
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_spin.data.datasets import Batches, Rows, collate, epoch_order, share_of_rank

IDS = pa.list_(pa.int32())


def rows_of(prompts: list[list[int]], real: list[list[int]], generated: list[list[int]]) -> Rows:
    count = len(prompts)
    return Rows(
        pa.table(
            {
                "prompt_ids": pa.array(prompts, IDS),
                "real_ids": pa.array(real, IDS),
                "generated_ids": pa.array(generated, IDS),
                "opponent_real_logps": pa.array([-1.0 * i for i in range(count)]),
                "opponent_generated_logps": pa.array([-2.0 * i for i in range(count)]),
            }
        )
    )


def test_every_response_token_is_predicted_from_the_position_before_it() -> None:
    rows = rows_of([[5, 6], [7]], [[8, 2], [9, 10, 2]], [[11, 2], [2]])
    batch = collate(rows, [0, 1])
    assert batch.input_ids.tolist() == [[5, 6, 8, 2], [5, 6, 11, 2], [7, 9, 10, 2], [7, 2, 0, 0]]
    flat = batch.input_ids.flatten()
    # the target of a position is the token after it
    assert torch.equal(flat[batch.target_positions + 1], batch.target_ids)
    assert batch.target_ids.tolist() == [8, 2, 11, 2, 9, 10, 2, 2]
    assert batch.target_sequences.tolist() == [0, 0, 1, 1, 2, 2, 2, 3]
    assert batch.opponent_logps.tolist() == [0.0, 0.0, -1.0, -2.0]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3]


def test_a_ghost_has_weight_zero_and_no_row_number() -> None:
    rows = rows_of([[5]], [[8, 2]], [[2]])
    batch = collate(rows, [0, -1])
    assert batch.weights.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert batch.rows == (0, -1)


def test_sequence_length_is_padded_to_a_multiple() -> None:
    rows = rows_of([[5, 6]], [[8, 2, 3]], [[2]])
    assert collate(rows, [0], pad_to_multiple=4).input_ids.shape == (2, 8)


def test_rows_of_a_slice_of_a_larger_table_are_its_own() -> None:
    table = pa.table(
        {"prompt_ids": pa.array([[1], [2, 3], [4]], IDS), "real_ids": pa.array([[5], [6], [7]], IDS)}
    )
    rows = Rows(table.slice(1), ("real_ids",))
    assert [ids.tolist() for ids in rows.sequences(0)[0]] == [[2, 3], [6]]
    assert rows.lengths().tolist() == [3, 2]


@given(
    count=st.integers(1, 60),
    micro_batch_size=st.integers(1, 5),
    dp_size=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_ranks_share_a_batch_without_loss_or_repetition(
    count: int, micro_batch_size: int, dp_size: int, seed: int
) -> None:
    indices = np.random.default_rng(seed).permutation(1000)[:count]
    shares = [
        share_of_rank(indices, micro_batch_size=micro_batch_size, dp_rank=rank, dp_size=dp_size)
        for rank in range(dp_size)
    ]
    assert len({len(share) for share in shares}) == 1, "every rank runs the same number of microbatches"
    seen = [row for share in shares for microbatch in share for row in microbatch if row >= 0]
    assert sorted(seen) == sorted(indices.tolist())


@given(num_rows=st.integers(1, 50), global_batch_size=st.integers(1, 20), epochs=st.integers(1, 3))
def test_every_epoch_visits_every_row_once(num_rows: int, global_batch_size: int, epochs: int) -> None:
    batches = Batches(num_rows, global_batch_size, epochs, seed=1, iteration=2)
    assert batches.num_steps == epochs * batches.steps_per_epoch
    for epoch in range(epochs):
        first = epoch * batches.steps_per_epoch
        steps = range(first, first + batches.steps_per_epoch)
        seen = np.concatenate([batches.indices(step) for step in steps])
        assert sorted(seen) == list(range(num_rows))


def test_order_depends_on_seed_iteration_and_epoch_alone() -> None:
    order = epoch_order(100, seed=1, iteration=0, epoch=0)
    assert np.array_equal(order, epoch_order(100, seed=1, iteration=0, epoch=0))
    for other in ({"seed": 2}, {"iteration": 1}, {"epoch": 1}):
        changed = {"seed": 1, "iteration": 0, "epoch": 0} | other
        assert not np.array_equal(order, epoch_order(100, **changed))
