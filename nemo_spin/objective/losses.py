"""The losses of SPIN (arXiv 2401.01335, Assumption 5.1), of the margin between two players.

The margin of a pair is beta times the policy's gain over its opponent on the real
response, less its gain on the generated one (`margin`). Each loss is convex and falls
in it; `margin = 0` is where every iteration begins.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_KNEE = 20.0  # e^20 times a gradient, squared for its norm, still fits into float32


class PairLogps(NamedTuple):
    """Log-probabilities of a batch of pairs, each a sum over response tokens, in nats.

    Attributes:
        policy_real, policy_generated: [pairs], float32, of the model in training.
        opponent_real, opponent_generated: [pairs], of the model that generated, constants.
    """

    policy_real: Tensor
    policy_generated: Tensor
    opponent_real: Tensor
    opponent_generated: Tensor


def margin(logps: PairLogps, beta: float) -> Tensor:
    """t = beta [(log p_theta - log p_theta_t)(y) - (log p_theta - log p_theta_t)(y')].

    The argument of the loss in eq. (4.7) of arXiv 2401.01335 (y real, y' generated;
    `beta` is the paper's lambda). Differences are taken between policy and opponent
    first: both are large, their gains are small.

    Returns:
        [pairs], dtype of the policy's log-probabilities.
    """
    real_gain, generated_gain = gains(logps)
    return beta * (real_gain - generated_gain)


def gains(logps: PairLogps) -> tuple[Tensor, Tensor]:
    """The policy's gain over its opponent on the real and on the generated response, in nats.

    Returns:
        Each [pairs], dtype of the policy's log-probabilities.
    """
    return logps.policy_real - logps.opponent_real, logps.policy_generated - logps.opponent_generated


def rewards(logps: PairLogps, beta: float) -> tuple[Tensor, Tensor]:
    """The implicit rewards r = beta (log p_theta - log p_theta_t) of the real and the generated response.

    The margin is their difference (section 4 of arXiv 2401.01335; Rafailov et al., arXiv 2305.18290).

    Returns:
        Each [pairs], dtype of the policy's log-probabilities.
    """
    real_gain, generated_gain = gains(logps)
    return beta * real_gain, beta * generated_gain


def logistic(margin: Tensor) -> Tensor:
    """log(1 + e^-t), the paper's choice; ln 2 at t = 0. Linear, not infinite, for t -> -inf."""
    return -functional.logsigmoid(margin)


def hinge(margin: Tensor) -> Tensor:
    """max(0, 1 - t)."""
    return functional.relu(1.0 - margin)


def exponential(margin: Tensor) -> Tensor:
    """e^-t; below t = -20, where it is 5e8 already, its tangent there, so that it stays finite."""
    tangent = math.exp(_KNEE) * (1.0 - _KNEE - margin)
    return torch.where(margin < -_KNEE, tangent, (-margin.clamp(min=-_KNEE)).exp())


def correlation(margin: Tensor) -> Tensor:
    """1 - t."""
    return 1.0 - margin


Loss = Callable[[Tensor], Tensor]

LOSSES: dict[str, Loss] = {
    "logistic": logistic,
    "hinge": hinge,
    "exponential": exponential,
    "correlation": correlation,
}
