"""Losses against numbers worked out by hand, and gradients against central differences."""

import math

import pytest
import torch

from nemo_spin.objective.losses import LOSSES, PairLogps, exponential, logistic, margin, rewards

# At t = ln 3: e^-t = 1/3, so logistic is ln(4/3) with slope -1/4 = -e^-t / (1 + e^-t).
BY_HAND = [
    ("logistic", 0.0, math.log(2.0), -0.5),
    ("logistic", math.log(3.0), math.log(4.0 / 3.0), -0.25),
    ("logistic", -math.log(3.0), math.log(4.0), -0.75),
    ("hinge", 0.25, 0.75, -1.0),
    ("hinge", 2.0, 0.0, 0.0),
    ("exponential", math.log(3.0), 1.0 / 3.0, -1.0 / 3.0),
    ("exponential", 0.0, 1.0, -1.0),
    ("correlation", 0.25, 0.75, -1.0),
    ("correlation", -3.0, 4.0, -1.0),
]


@pytest.mark.parametrize(("name", "t", "value", "slope"), BY_HAND)
def test_value_and_slope(name: str, t: float, value: float, slope: float) -> None:
    at = torch.tensor([t], dtype=torch.float64, requires_grad=True)
    loss = LOSSES[name](at)
    loss.sum().backward()
    assert loss.item() == pytest.approx(value, abs=1e-12)
    assert at.grad is not None
    assert at.grad.item() == pytest.approx(slope, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logistic_at_extreme_margins_neither_overflows_nor_loses_its_gradient(dtype: torch.dtype) -> None:
    at = torch.tensor([1e4, -1e4], dtype=dtype, requires_grad=True)
    loss = logistic(at)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 1e4]
    assert at.grad is not None
    assert at.grad.tolist() == [0.0, -1.0]


def test_margin_is_beta_times_the_difference_of_gains() -> None:
    # gains: real -10 - -12 = 2, generated -7 - -6 = -1; margin 0.5 * (2 - -1) = 1.5
    logps = PairLogps(*(torch.tensor([value]) for value in (-10.0, -7.0, -12.0, -6.0)))
    assert margin(logps, beta=0.5).tolist() == [1.5]
    assert [reward.tolist() for reward in rewards(logps, beta=0.5)] == [[1.0], [-0.5]]


def test_margin_gradient_pulls_real_up_and_generated_down() -> None:
    real = torch.tensor([-10.0], requires_grad=True)
    generated = torch.tensor([-7.0], requires_grad=True)
    margin(PairLogps(real, generated, torch.tensor([-9.0]), torch.tensor([-5.0])), beta=0.1).sum().backward()
    assert real.grad is not None and real.grad.item() == pytest.approx(0.1)
    assert generated.grad is not None and generated.grad.item() == pytest.approx(-0.1)


def test_a_policy_that_equals_its_opponent_has_margin_zero() -> None:
    logps = torch.randn(64) * 300
    other = torch.randn(64) * 300
    assert torch.equal(margin(PairLogps(logps, other, logps, other), 0.1), torch.zeros(64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "values", "slopes"),
    [
        ("logistic", (0.0, 1e4), (0.0, -1.0)),
        ("hinge", (0.0, 10001.0), (0.0, -1.0)),
        # below -20 its tangent there: e^20 (1 - 20 + 1e4)
        ("exponential", (0.0, math.exp(20.0) * 9981.0), (0.0, -math.exp(20.0))),
        ("correlation", (-9999.0, 10001.0), (-1.0, -1.0)),
    ],
)
def test_extreme_margins(
    name: str, values: tuple[float, float], slopes: tuple[float, float], dtype: torch.dtype
) -> None:
    at = torch.tensor([1e4, -1e4], dtype=dtype, requires_grad=True)
    loss = LOSSES[name](at)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx(values, rel=1e-6)
    assert at.grad is not None
    assert at.grad.tolist() == pytest.approx(slopes, rel=1e-6)


def test_the_exponential_loss_meets_its_tangent_smoothly() -> None:
    at = torch.tensor([-20.0 + 1e-9, -20.0 - 1e-9], dtype=torch.float64, requires_grad=True)
    loss = exponential(at)
    loss.sum().backward()
    assert at.grad is not None
    assert loss.tolist() == pytest.approx([math.exp(20.0)] * 2, rel=1e-8)
    assert at.grad.tolist() == pytest.approx([-math.exp(20.0)] * 2, rel=1e-8)


@pytest.mark.parametrize("t", [-19.0, -3.0, 0.5, 19.0])
def test_the_exponential_loss_is_exact_above_it_in_float32(t: float) -> None:
    at = torch.tensor([t], requires_grad=True)
    exponential(at).sum().backward()
    assert exponential(at).item() == pytest.approx(math.exp(-t), rel=1e-6)
    assert at.grad is not None and at.grad.item() == pytest.approx(-math.exp(-t), rel=1e-6)
