"""Options that combine with every loss.

All but two map a pair's log-probabilities to others that the loss then takes in their
place. `smoothed` wraps the loss, and `nll_per_token` is added to it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from nemo_spin.objective.losses import PairLogps
from nemo_spin.objective.neighbours import PairLoss


class PairLengths(NamedTuple):
    """Response tokens of a batch of pairs, each at least 1, the closing EOS included.

    Attributes:
        real, generated: [pairs], any number type.
    """

    real: Tensor
    generated: Tensor


class BaseLogps(NamedTuple):
    """Log-probabilities of the responses under theta_0, sums in nats, constants.

    Attributes:
        real, generated: [pairs], float32.
    """

    real: Tensor
    generated: Tensor


def mixed_opponent(logps: PairLogps, base: BaseLogps, weight: float) -> PairLogps:
    """alpha-SPIN's opponent: (1 - a) log p_theta_t + a log p_theta_0, with a = `weight`.

    arXiv 2404.04291: staying near theta_0 by a KL penalty replaces the opponent inside the
    loss by its geometric mixture with theta_0. The mixture's normaliser depends on the
    prompt alone and cancels in the margin, so it is left out; in a loss of the single gains
    (NCA) it does not cancel. `weight` 0 is SPIN; 1 is DPO's fixed reference.
    """
    return logps._replace(
        opponent_real=(1.0 - weight) * logps.opponent_real + weight * base.real,
        opponent_generated=(1.0 - weight) * logps.opponent_generated + weight * base.generated,
    )


def per_token(logps: PairLogps, lengths: PairLengths) -> PairLogps:
    """Means over response tokens in place of sums (length-normalised DPO, arXiv 2411.15124).

    Margins become smaller by a factor of the length: `beta` is chosen accordingly larger.
    """
    return PairLogps(
        policy_real=logps.policy_real / lengths.real,
        policy_generated=logps.policy_generated / lengths.generated,
        opponent_real=logps.opponent_real / lengths.real,
        opponent_generated=logps.opponent_generated / lengths.generated,
    )


def penalised(logps: PairLogps, weight: float) -> PairLogps:
    """DPO-Positive: the real response's gain less `weight` * max(0, its loss against the opponent).

    Eq. (3) of arXiv 2402.13228 subtracts that term from the difference of gains, inside the
    sigmoid and before `beta`; taking it off the policy's log-probability is the same. Where
    the policy gives the real response less than the opponent did, its gradient is 1 + `weight`
    times as large; elsewhere nothing changes.
    """
    fallen = functional.relu(logps.opponent_real - logps.policy_real)
    return logps._replace(policy_real=logps.policy_real - weight * fallen)


def swapped(logps: PairLogps) -> PairLogps:
    """The pair with its responses exchanged; its margin has the other sign."""
    return PairLogps(
        policy_real=logps.policy_generated,
        policy_generated=logps.policy_real,
        opponent_real=logps.opponent_generated,
        opponent_generated=logps.opponent_real,
    )


def smoothed(loss: PairLoss, epsilon: float) -> PairLoss:
    """(1 - e) l(pair) + e l(swapped pair): a share e of the labels is taken to be wrong.

    With the logistic loss the label smoothing of "conservative" DPO: (1 - e) l(t) + e l(-t),
    which no longer falls beyond t = log((1 - e) / e).
    """

    def smoothed_loss(logps: PairLogps, beta: float) -> Tensor:
        return (1.0 - epsilon) * loss(logps, beta) + epsilon * loss(swapped(logps), beta)

    return smoothed_loss


def nll_per_token(policy_real: Tensor, real_lengths: Tensor) -> Tensor:
    """-log p_theta(y) / |y| of the real response, in nats per token: plain fine-tuning's term.

    Added to a preference loss with the length in the denominator in arXiv 2404.19733.

    Args:
        policy_real: [pairs], sums over response tokens.
        real_lengths: [pairs], tokens.
    """
    return -policy_real / real_lengths
