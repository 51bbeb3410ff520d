"""Losses of your own: `nemo-spin run … spin.loss=examples/losses/own_loss.py:squared_hinge`.

A loss returns one value for each pair, made of torch operations, and falls as the margin
grows from 0, where every iteration begins. It takes either the margin alone, or the
log-probabilities it is made of and `beta`.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from nemo_spin.objective.losses import PairLogps


def squared_hinge(margin: Tensor) -> Tensor:
    """max(0, 1 - t)^2: as the hinge, but it pulls less the nearer a pair is to being told apart."""
    return functional.relu(1.0 - margin).square()


def real_only(logps: PairLogps, beta: float) -> Tensor:
    """log(1 + e^-r) of the real response's gain alone: what training does without an opponent's answers."""
    return -functional.logsigmoid(beta * (logps.policy_real - logps.opponent_real))
