"""The objective built from plain values: formulas of others, combinations, its start."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_spin.objective.losses import LOSSES, PairLogps, margin
from nemo_spin.objective.neighbours import NEIGHBOURS, ipo, nca
from nemo_spin.objective.objective import build_objective
from nemo_spin.objective.options import BaseLogps, PairLengths
from tests.unit.objective.pairs import differences, gradients, pair

LENGTHS = PairLengths(torch.tensor([4]), torch.tensor([2]))
BASE = BaseLogps(torch.tensor([-9.0], dtype=torch.float64), torch.tensor([-6.5], dtype=torch.float64))


def batch(pairs: int = 256, scale: float = 200.0) -> PairLogps:
    torch.manual_seed(3)
    policy, opponent = torch.randn(2, 2, pairs, dtype=torch.float64) * scale - 300.0
    return PairLogps(policy[0].requires_grad_(), policy[1].requires_grad_(), opponent[0], opponent[1])


def lengths_of(logps: PairLogps) -> PairLengths:
    generator = torch.Generator().manual_seed(4)
    real, generated = torch.randint(1, 300, (2, len(logps.policy_real)), generator=generator)
    return PairLengths(real, generated)


def assert_same(ours: Tensor, theirs: Tensor, logps: PairLogps) -> None:
    """Equal values, and equal gradients by the policy's log-probabilities."""
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    policy = (logps.policy_real, logps.policy_generated)
    mine_by, other_by = (
        torch.autograd.grad(loss.sum(), policy, retain_graph=True) for loss in (ours, theirs)
    )
    for mine, other in zip(mine_by, other_by, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_logistic_and_hinge_are_the_official_code_s(beta: float) -> None:
    # uclaml/SPIN subtracts log-ratios of the players, real less generated within each, and
    # takes -log sigmoid, or the hinge, of beta times that.
    logps = batch(scale=5.0)
    within_policy = logps.policy_real - logps.policy_generated
    within_opponent = logps.opponent_real - logps.opponent_generated
    inside = beta * (within_policy - within_opponent)
    lengths = lengths_of(logps)
    ours = build_objective(loss="logistic", beta=beta)(logps, lengths)
    assert_same(ours, -torch.log(1.0 / (1.0 + torch.exp(-inside))), logps)
    ours = build_objective(loss="hinge", beta=beta)(logps, lengths)
    assert_same(ours, torch.clamp(1.0 - inside, min=0.0), logps)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.4])
def test_logistic_is_trl_s_sigmoid_loss(label_smoothing: float) -> None:
    # TRL: chosen and rejected log-ratios against the reference, their difference times beta;
    # -(1 - e) log sigmoid(x) - e log sigmoid(-x). log sigmoid(x) = min(x, 0) - log(1 + e^-|x|).
    logps, beta = batch(), 0.1
    chosen = logps.policy_real - logps.opponent_real
    rejected = logps.policy_generated - logps.opponent_generated
    x = beta * (chosen - rejected)

    def log_sigmoid(x: Tensor) -> Tensor:
        return x.clamp(max=0.0) - torch.log1p(torch.exp(-x.abs()))

    theirs = -(1 - label_smoothing) * log_sigmoid(x) - label_smoothing * log_sigmoid(-x)
    ours = build_objective(loss="logistic", beta=beta, label_smoothing=label_smoothing)
    assert_same(ours(logps, lengths_of(logps)), theirs, logps)


def test_length_normalised_ipo_is_trl_s() -> None:
    # TRL averages each log-ratio over its response's tokens, then (difference - 1 / (2 beta))^2
    logps, beta = batch(scale=20.0), 0.3
    lengths = lengths_of(logps)
    chosen = (logps.policy_real - logps.opponent_real) / lengths.real
    rejected = (logps.policy_generated - logps.opponent_generated) / lengths.generated
    ours = build_objective(loss="ipo", beta=beta, length_normalized=True)
    assert_same(ours(logps, lengths), (chosen - rejected - 1 / (2 * beta)) ** 2, logps)


@pytest.mark.parametrize("name", [*LOSSES, *NEIGHBOURS])
def test_without_options_nothing_is_added(name: str) -> None:
    logps = batch(scale=5.0)
    objective = build_objective(loss=name, beta=0.2)
    expected = LOSSES[name](margin(logps, 0.2)) if name in LOSSES else NEIGHBOURS[name](logps, 0.2)
    assert torch.equal(objective(logps, lengths_of(logps)), expected)
    assert torch.equal(objective.margins(logps, lengths_of(logps)), margin(logps, 0.2))
    assert not objective.needs_base


VALUES = (-12.0, -11.0, -10.0, -6.0)


def test_all_options_together_by_hand() -> None:
    # Opponent: half theta_t (-10, -6), half theta_0 (-9, -6.5): -9.5, -6.25.
    # Gains -2.5 and -4.75; per token (4, 2): -0.625 and -2.375. Margin at beta 2: 3.5.
    # Penalty 0.4 of the fallen 0.625: real gain -0.875; difference 1.5; t = 3.
    # Hinge with smoothing 0.25: 0.75 * 0 + 0.25 * (1 + 3) = 1. NLL 12 / 4 = 3, weight 0.1: 0.3.
    # Slopes: 0.25 * t', t' = 2 * 1.4 / 4 by real, -2 / 2 by generated; NLL -0.1 / 4.
    logps = pair(*VALUES)
    objective = build_objective(
        loss="hinge",
        beta=2.0,
        length_normalized=True,
        label_smoothing=0.25,
        sft_weight=0.1,
        dpop_weight=0.4,
        opponent_mix=0.5,
    )
    loss = objective(logps, LENGTHS, BASE)
    assert loss.item() == pytest.approx(1.3, abs=1e-12)
    assert gradients(loss, logps) == pytest.approx((0.25 * 0.7 - 0.025, -0.25), abs=1e-12)
    margins = objective.margins(logps, LENGTHS, BASE)
    assert margins.item() == pytest.approx(3.5, abs=1e-12) and not margins.requires_grad
    assert objective.needs_base


@pytest.mark.parametrize("name", [*LOSSES, *NEIGHBOURS])
@pytest.mark.parametrize(
    "options",
    [
        {"length_normalized": True},
        {"label_smoothing": 0.2},
        {"sft_weight": 0.3},
        {"dpop_weight": 2.0},
        {"opponent_mix": 0.3},
        {
            "length_normalized": True,
            "label_smoothing": 0.2,
            "sft_weight": 0.3,
            "dpop_weight": 2.0,
            "opponent_mix": 0.3,
        },
    ],
    ids=lambda options: "+".join(options),
)
def test_gradients_are_those_of_the_values(name: str, options: dict[str, Any]) -> None:
    objective = build_objective(loss=name, beta=0.4, **options)
    logps = pair(*VALUES)
    found = gradients(objective(logps, LENGTHS, BASE), logps)
    expected = differences(lambda values: objective(values, LENGTHS, BASE).item(), VALUES)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_at_the_start_the_policy_is_its_opponent() -> None:
    logps = pair(*VALUES)
    start = build_objective(loss="logistic", beta=0.4).at_start(logps, LENGTHS)
    assert start.item() == pytest.approx(math.log(2.0), abs=1e-15) and not start.requires_grad
    # with an NLL term of weight 0.1: the opponent's 10 nats over 4 tokens
    start = build_objective(loss="logistic", beta=0.4, sft_weight=0.1).at_start(logps, LENGTHS)
    assert start.item() == pytest.approx(math.log(2.0) + 0.25, abs=1e-15)
    # with theta_0 alone as opponent, gains -10 + 9 and -6 + 6.5: t = 0.4 * -1.5 = -0.6
    start = build_objective(loss="correlation", beta=0.4, opponent_mix=1.0).at_start(logps, LENGTHS, BASE)
    assert start.item() == pytest.approx(1.6, abs=1e-12)


def test_what_is_reported_is_float32_when_the_policy_is() -> None:
    logps = pair(*VALUES, dtype=torch.float32)
    base = BaseLogps(BASE.real.float(), BASE.generated.float())
    objective = build_objective(
        loss="nca", beta=0.4, length_normalized=True, sft_weight=0.1, dpop_weight=1.0, opponent_mix=0.5
    )
    assert objective(logps, LENGTHS, base).dtype == torch.float32


def test_neighbours_are_found_by_name() -> None:
    assert build_objective(loss="ipo", beta=1.0).loss is ipo
    assert build_objective(loss="nca", beta=1.0).loss is nca


@pytest.mark.parametrize("settings", [{}, {"length_normalized": True}, {"opponent_mix": 0.25}])
def test_the_margin_is_the_difference_of_the_rewards(settings: dict[str, Any]) -> None:
    objective = build_objective(loss="logistic", beta=0.3, **settings)
    logps = pair(-10.0, -7.0, -12.0, -6.0)
    real, generated = objective.rewards(logps, LENGTHS, BASE)
    torch.testing.assert_close(real - generated, objective.margins(logps, LENGTHS, BASE))
    assert not real.requires_grad and not generated.requires_grad


def test_rewards_by_hand() -> None:
    # per token: real (-10 + 12) / 4, generated (-7 + 6) / 2
    logps = pair(-10.0, -7.0, -12.0, -6.0)
    rewards = build_objective(loss="logistic", beta=2.0, length_normalized=True).rewards(logps, LENGTHS)
    assert [reward.item() for reward in rewards] == [1.0, -1.0]
