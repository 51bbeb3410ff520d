"""Values that differ between iterations."""

from __future__ import annotations

import pytest

from nemo_spin.config.iterations import at_iteration


def test_a_scalar_holds_in_all() -> None:
    assert [at_iteration(0.1, iteration) for iteration in range(3)] == [0.1, 0.1, 0.1]


def test_a_list_has_one_for_each() -> None:
    assert [at_iteration([0.1, 0.2, 5], iteration) for iteration in range(3)] == [0.1, 0.2, 5]


@pytest.mark.parametrize("iteration", [-1, 2])
def test_an_iteration_that_the_list_does_not_have(iteration: int) -> None:
    with pytest.raises(AssertionError, match="of a list of 2"):
        at_iteration([1, 2], iteration)
