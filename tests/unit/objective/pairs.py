"""Pairs of numbers for tests of objectives, and gradients by autograd and by differences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nemo_spin.objective.losses import PairLogps


def pair(*values: float, dtype: torch.dtype = torch.float64) -> PairLogps:
    """One pair: policy real and generated (leaves of a graph), opponent real and generated."""
    policy_real, policy_generated, opponent_real, opponent_generated = (
        torch.tensor([value], dtype=dtype) for value in values
    )
    return PairLogps(
        policy_real.requires_grad_(), policy_generated.requires_grad_(), opponent_real, opponent_generated
    )


def gradients(loss: Tensor, logps: PairLogps) -> tuple[float, float]:
    """By the policy's log-probability of the real and of the generated response."""
    real, generated = torch.autograd.grad(
        loss.sum(),
        (logps.policy_real, logps.policy_generated),
        allow_unused=True,
        materialize_grads=True,
    )
    return real.item(), generated.item()


def differences(
    function: Callable[[PairLogps], float], values: tuple[float, ...], step: float = 1e-6
) -> tuple[float, float]:
    """Central differences of a plain Python function of the four numbers, by the first two."""

    def slope(position: int) -> float:
        above, below = list(values), list(values)
        above[position] += step
        below[position] -= step
        return (function(pair(*above)) - function(pair(*below))) / (2.0 * step)

    return slope(0), slope(1)
