"""Losses that users compare SPIN with, and that need more of a pair than its margin.

Both take the pair's log-probabilities and `beta`; generations of the opponent stand for
the rejected responses of the papers.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from nemo_spin.objective.losses import PairLogps, margin


def ipo(logps: PairLogps, beta: float) -> Tensor:
    """(h - 1 / (2 beta))^2, with h the difference of gains, not multiplied by beta.

    Eq. (17) of arXiv 2310.12036 (its tau is `beta`). It pulls h to 1 / (2 beta) and back
    again when it is past it, where the logistic loss only ever pushes on. Implementations
    commonly average log-probabilities over tokens for it: `length_normalized`.

    Returns:
        [pairs], dtype of the policy's log-probabilities.
    """
    return (margin(logps, 1.0) - 0.5 / beta).square()


def nca(logps: PairLogps, beta: float) -> Tensor:
    """-log s(r) - 1/2 log s(-r) - 1/2 log s(-r'), with r, r' = beta times the two gains.

    NCA of arXiv 2402.05369 for two responses of which the real one is preferred with
    certainty; s is the sigmoid. It depends on each gain by itself: at r = 0 it falls with
    r whatever r' is, so real responses cannot lose probability unnoticed. 2 ln 2 at r = r' = 0.

    Returns:
        [pairs], dtype of the policy's log-probabilities.
    """
    real = beta * (logps.policy_real - logps.opponent_real)
    generated = beta * (logps.policy_generated - logps.opponent_generated)
    log_s = functional.logsigmoid  # exact at both ends; softplus is cut off at 20
    return -log_s(real) - 0.5 * log_s(-real) - 0.5 * log_s(-generated)


PairLoss = Callable[[PairLogps, float], Tensor]

NEIGHBOURS: dict[str, PairLoss] = {"ipo": ipo, "nca": nca}
