"""Each option against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_spin.objective.losses import PairLogps, correlation, exponential, hinge, logistic, margin
from nemo_spin.objective.neighbours import PairLoss, ipo, nca
from nemo_spin.objective.objective import OfMargin
from nemo_spin.objective.options import (
    BaseLogps,
    PairLengths,
    mixed_opponent,
    nll_per_token,
    penalised,
    per_token,
    smoothed,
    swapped,
)
from tests.unit.objective.pairs import gradients, pair


def one(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


def test_per_token_divides_each_response_by_its_own_length() -> None:
    # gains 2 over 4 tokens and -1 over 2: 0.5 - -0.5, beta 3 -> margin 3; slopes 3/4 and -3/2
    logps = pair(-10.0, -7.0, -12.0, -6.0)
    lengths = PairLengths(torch.tensor([4]), torch.tensor([2]))
    means = per_token(logps, lengths)
    assert [value.item() for value in means] == [-2.5, -3.5, -3.0, -3.0]
    t = margin(means, 3.0)
    assert t.item() == 3.0
    assert gradients(t, logps) == (0.75, -1.5)


def test_a_mixed_opponent_by_hand() -> None:
    # opponent 0.75 of theta_t and 0.25 of theta_0: real -12 and -16 -> -13, generated -6 and -2 -> -5
    logps = pair(-10.0, -7.0, -12.0, -6.0)
    mixed = mixed_opponent(logps, BaseLogps(one(-16.0), one(-2.0)), 0.25)
    assert (mixed.opponent_real.item(), mixed.opponent_generated.item()) == (-13.0, -5.0)
    assert margin(mixed, 0.5).item() == 0.5 * ((-10.0 + 13.0) - (-7.0 + 5.0))
    assert gradients(margin(mixed, 0.5), logps) == (0.5, -0.5)


@pytest.mark.parametrize(("weight", "expected"), [(0.0, (-12.0, -6.0)), (1.0, (-16.0, -2.0))])
def test_the_ends_of_the_mixture_are_theta_t_and_theta_0(
    weight: float, expected: tuple[float, float]
) -> None:
    mixed = mixed_opponent(pair(-10.0, -7.0, -12.0, -6.0), BaseLogps(one(-16.0), one(-2.0)), weight)
    assert (mixed.opponent_real.item(), mixed.opponent_generated.item()) == expected


def test_the_mixture_s_normaliser_cancels_in_the_margin() -> None:
    # Over three responses: p_t and p_0 known, the mixture normalised and not.
    p_t, p_0 = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.2, 0.2, 0.6]).log()
    weight, policy = 0.4, torch.tensor([0.6, 0.3, 0.1]).log()
    unnormalised = (1 - weight) * p_t + weight * p_0
    normalised = unnormalised.log_softmax(dim=0)
    assert not torch.allclose(unnormalised, normalised)
    y, other = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2])
    mixed = mixed_opponent(
        PairLogps(policy[y], policy[other], p_t[y], p_t[other]), BaseLogps(p_0[y], p_0[other]), weight
    )
    expected = PairLogps(policy[y], policy[other], normalised[y], normalised[other])
    torch.testing.assert_close(margin(mixed, 2.0), margin(expected, 2.0))


def test_the_penalty_by_hand() -> None:
    # real gain -2 (fallen), generated gain -5: DPO's difference 3; DPOP's 3 - 0.5 * 2 = 2.
    # At beta 0.5 t = 1; by the real log-probability beta (1 + 0.5).
    logps = pair(-12.0, -11.0, -10.0, -6.0)
    assert margin(logps, 0.5).item() == 1.5
    t = margin(penalised(logps, 0.5), 0.5)
    assert t.item() == 1.0
    assert gradients(t, logps) == (0.75, -0.5)


def test_the_penalty_leaves_a_gain_alone() -> None:
    logps = pair(-10.0, -7.0, -12.0, -6.0)
    t = margin(penalised(logps, 50.0), 0.5)
    assert t.item() == margin(logps, 0.5).item() == 1.5
    assert gradients(t, logps) == (0.5, -0.5)


def test_the_penalised_logistic_loss_is_dpo_positive_s() -> None:
    # -log s(beta (log pi/ref (y_w) - log pi/ref (y_l) - lambda max(0, log ref/pi (y_w))))
    beta, weight, values = 0.3, 5.0, (-12.0, -14.0, -10.5, -6.0)
    w, lost, ref_w, ref_lost = values
    inside = beta * ((w - ref_w) - (lost - ref_lost) - weight * max(0.0, ref_w - w))
    logps = pair(*values)
    loss = logistic(margin(penalised(logps, weight), beta))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-inside)), rel=1e-12)
    slope = -1.0 / (1.0 + math.exp(inside))
    assert gradients(loss, logps) == pytest.approx((slope * beta * 6.0, -slope * beta), rel=1e-12)


def test_swapping_changes_the_sign_of_the_margin() -> None:
    logps = pair(-10.0, -7.0, -12.0, -6.0)
    assert margin(swapped(logps), 0.5).item() == -1.5
    assert [value.item() for value in swapped(swapped(logps))] == [value.item() for value in logps]


def test_label_smoothing_by_hand() -> None:
    # t = ln 3: l(t) = ln 4/3 with slope -1/4, l(-t) = ln 4 with slope (by t) 3/4; e = 0.1
    logps = pair(-10.0 + math.log(3.0), -7.0, -10.0, -7.0)
    loss = smoothed(OfMargin(logistic), 0.1)(logps, 1.0)
    assert loss.item() == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * math.log(4), abs=1e-12)
    slope = 0.9 * -0.25 + 0.1 * 0.75
    assert gradients(loss, logps) == pytest.approx((slope, -slope), abs=1e-12)


def test_a_smoothed_loss_is_flat_where_its_docstring_says() -> None:
    epsilon = 0.2
    logps = pair(math.log((1 - epsilon) / epsilon), 0.0, 0.0, 0.0)
    loss = smoothed(OfMargin(logistic), epsilon)(logps, 1.0)
    assert gradients(loss, logps) == pytest.approx((0.0, 0.0), abs=1e-15)


def test_smoothing_the_correlation_scales_it() -> None:
    # (1 - e)(1 - t) + e (1 + t) = 1 - (1 - 2e) t
    logps = pair(2.0, 0.5, 0.0, 0.0)
    loss = smoothed(OfMargin(correlation), 0.25)(logps, 1.0)
    assert loss.tolist() == [0.25] and gradients(loss, logps) == (-0.5, 0.5)


def test_nll_per_token_by_hand() -> None:
    logps = pair(-10.0, -7.0, -12.0, -6.0)
    loss = nll_per_token(logps.policy_real, torch.tensor([4]))
    assert loss.tolist() == [2.5]
    assert gradients(loss, logps) == (-0.25, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    "loss", [*map(OfMargin, (logistic, hinge, exponential, correlation)), ipo, nca], ids=str
)
def test_options_at_extreme_margins_stay_finite(loss: PairLoss, sign: float, dtype: torch.dtype) -> None:
    logps = pair(sign * 5e3, sign * -5e3, 0.0, 0.0, dtype=dtype)
    lengths = PairLengths(torch.tensor([1]), torch.tensor([1]))
    zero = torch.zeros(1, dtype=dtype)
    adjusted = per_token(mixed_opponent(logps, BaseLogps(zero, zero), 0.5), lengths)
    assert margin(adjusted, 1.0).item() == sign * 1e4
    values = smoothed(loss, 0.1)(penalised(adjusted, 0.5), 1.0)
    values = values + nll_per_token(logps.policy_real, lengths.real)
    assert values.dtype == dtype and torch.isfinite(values).all()
    assert all(math.isfinite(slope) for slope in gradients(values, logps))
