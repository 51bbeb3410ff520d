"""Global batches: every unit once per epoch, in an order that depends on few numbers."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nemo_spin.data.datasets import Batches, epoch_order


@given(num_units=st.integers(1, 50), global_batch_size=st.integers(1, 20), epochs=st.integers(1, 3))
def test_every_epoch_visits_every_unit_once(num_units: int, global_batch_size: int, epochs: int) -> None:
    batches = Batches(num_units, global_batch_size, epochs, seed=1, iteration=2)
    assert batches.num_steps == epochs * batches.steps_per_epoch
    for epoch in range(epochs):
        first = epoch * batches.steps_per_epoch
        steps = range(first, first + batches.steps_per_epoch)
        seen = np.concatenate([batches.indices(step) for step in steps])
        assert sorted(seen) == list(range(num_units))


def test_order_depends_on_seed_iteration_and_epoch_alone() -> None:
    order = epoch_order(100, seed=1, iteration=0, epoch=0)
    assert np.array_equal(order, epoch_order(100, seed=1, iteration=0, epoch=0))
    for other in ({"seed": 2}, {"iteration": 1}, {"epoch": 1}):
        changed = {"seed": 1, "iteration": 0, "epoch": 0} | other
        assert not np.array_equal(order, epoch_order(100, **changed))
