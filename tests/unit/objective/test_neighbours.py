"""IPO and NCA against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_spin.objective.neighbours import ipo, nca
from tests.unit.objective.pairs import gradients, pair


def test_ipo_by_hand() -> None:
    # gains 2 and -1, h = 3; beta 0.25: target 1 / 0.5 = 2; loss (3 - 2)^2 = 1, slope 2 (3 - 2) = 2
    logps = pair(-10.0, -7.0, -12.0, -6.0)
    loss = ipo(logps, 0.25)
    assert loss.tolist() == [1.0]
    assert gradients(loss, logps) == (2.0, -2.0)


def test_ipo_at_the_start_and_at_its_target() -> None:
    # beta 0.1: target 5; at h = 0 the loss is 25 and its slope -10, at h = 5 both are 0
    start = pair(-10.0, -7.0, -10.0, -7.0)
    assert ipo(start, 0.1).item() == pytest.approx(25.0, abs=1e-12)
    assert gradients(ipo(start, 0.1), start) == pytest.approx((-10.0, 10.0), abs=1e-12)
    target = pair(-8.0, -10.0, -10.0, -7.0)
    assert ipo(target, 0.1).item() == pytest.approx(0.0, abs=1e-24)
    assert gradients(ipo(target, 0.1), target) == pytest.approx((0.0, 0.0), abs=1e-12)


def test_nca_by_hand() -> None:
    # r = ln 3, s(r) = 3/4: -ln 3/4 - ln(1/4)/2. r' = -ln 3, s(-r') = 3/4: -ln(3/4)/2
    # slopes: by r -1/4 + 3/8 = 1/8; by r' s(r')/2 = 1/8. beta 0.5 halves them.
    logps = pair(-10.0 + 2.0 * math.log(3.0), -7.0 - 2.0 * math.log(3.0), -10.0, -7.0)
    loss = nca(logps, 0.5)
    assert loss.item() == pytest.approx(math.log(4 / 3) + math.log(4) / 2 + math.log(4 / 3) / 2, abs=1e-12)
    assert gradients(loss, logps) == pytest.approx((1 / 16, 1 / 16), abs=1e-12)


def test_nca_at_the_start() -> None:
    # r = r' = 0: ln 2 (1 + 1/2 + 1/2); slopes -1/2 + 1/4 and 1/4, times beta
    logps = pair(-10.0, -7.0, -10.0, -7.0)
    assert nca(logps, 2.0).item() == pytest.approx(2.0 * math.log(2.0), abs=1e-12)
    assert gradients(nca(logps, 2.0), logps) == pytest.approx((-0.5, 0.5), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("real_gain", "generated_gain", "nca_value", "nca_slopes"),
    [
        # softplus(-r) + softplus(r)/2 + softplus(r')/2, slopes -s(-r) + s(r)/2 and s(r')/2
        (1e4, -1e4, 5e3, (0.5, 0.0)),
        (-1e4, 1e4, 1.5e4, (-1.0, 0.5)),
        (1e4, 1e4, 1e4, (0.5, 0.5)),
        (-1e4, -1e4, 1e4, (-1.0, 0.0)),
    ],
)
def test_extreme_gains(
    dtype: torch.dtype,
    real_gain: float,
    generated_gain: float,
    nca_value: float,
    nca_slopes: tuple[float, float],
) -> None:
    logps = pair(real_gain, generated_gain, 0.0, 0.0, dtype=dtype)
    loss = nca(logps, 1.0)
    assert loss.tolist() == [nca_value]
    assert gradients(loss, logps) == nca_slopes
    # h = 2e4, -2e4 or 0, less 1/2
    h = real_gain - generated_gain - 0.5
    loss = ipo(logps, 1.0)
    assert loss.item() == pytest.approx(h * h, rel=1e-6)
    assert gradients(loss, logps) == pytest.approx((2 * h, -2 * h), rel=1e-6)
