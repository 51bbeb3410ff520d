"""The schedule against values worked out by hand."""

import pytest

from nemo_spin.config.schema import SchedConfig
from nemo_spin.megatron.learning_rate import learning_rate


def rates(name: str, *, warmup_ratio: float = 0.2, min_lr_ratio: float = 0.0) -> list[float]:
    sched = SchedConfig(name=name, warmup_ratio=warmup_ratio, min_lr_ratio=min_lr_ratio)
    return [learning_rate(step, num_steps=10, peak=8.0, sched=sched) for step in range(10)]


def test_linear_warms_up_in_two_of_ten_steps_and_falls_in_eight() -> None:
    assert rates("linear") == pytest.approx([4, 8, 8, 7, 6, 5, 4, 3, 2, 1])


def test_constant_stays() -> None:
    assert rates("constant") == pytest.approx([4, 8] + [8] * 8)


def test_cosine_is_half_way_down_in_the_middle() -> None:
    values = rates("cosine")
    assert values[2] == pytest.approx(8.0)
    assert values[6] == pytest.approx(4.0)
    assert values[2:] == sorted(values[2:], reverse=True)


def test_decay_ends_at_the_share_that_was_asked_for() -> None:
    sched = SchedConfig(name="linear", warmup_ratio=0.0, min_lr_ratio=0.25)
    assert learning_rate(5, num_steps=10, peak=8.0, sched=sched) == pytest.approx(5.0)
    assert learning_rate(10, num_steps=10, peak=8.0, sched=sched) == pytest.approx(2.0)


def test_the_first_step_is_never_wasted_on_a_rate_of_zero() -> None:
    assert all(value > 0 for value in rates("linear", warmup_ratio=1.0))
