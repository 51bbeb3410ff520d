"""A user's own loss: found by name, and tried on a few pairs before it trains anything.

It has the signature of the losses here: `loss(margin)` as in `losses.py`, or
`loss(logps, beta)` as in `neighbours.py` where the margin is not enough. Both return
one value for each pair, [pairs], made of differentiable torch operations and of that pair
alone: a mean over the pairs it is given would depend on how they are packed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_spin.config.functions import load_function, unusable
from nemo_spin.errors import ConfigError
from nemo_spin.objective.losses import PairLogps, margin
from nemo_spin.objective.neighbours import PairLoss

_KEY = "spin.loss"
# Gains of the real and of the generated response in the pairs it is tried on, in nats.
_GAINS = ((0.0, 0.0), (1.0, -1.0), (-1.0, 1.0))


def load_user_loss(name: str) -> PairLoss:
    """The loss that `spin.loss` names, as a function of the pair.

    Raises:
        ConfigError: There is no such function, or it is not a loss. The function that is returned
            raises it, too, where the user's raises anything or returns another shape.
    """
    loss = _Checked(name, _of_pair(name, load_function(name, key=_KEY)))
    _try(name, loss)
    return loss


@dataclass(frozen=True)
class _Checked:
    """A user's loss that says in a few lines what is wrong with it, also in the middle of a training."""

    name: str
    loss: PairLoss

    def __call__(self, logps: PairLogps, beta: float) -> Tensor:
        try:
            values = self.loss(logps, beta)
        except Exception as error:  # a user's code may raise anything
            raise unusable(self.name, f"raised {type(error).__name__}: {error}", key=_KEY) from error
        number = len(logps.policy_real)
        if not isinstance(values, Tensor) or values.shape != (number,):
            shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            found = f"returned {shape} for {number} pairs, not one value each"
            raise unusable(self.name, found, key=_KEY)
        return values


def _of_pair(name: str, function: Callable[..., Any]) -> PairLoss:
    """`function` as a function of the pair, whichever of the two signatures it has."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise unusable(name, f"its parameters cannot be read ({error})", key=_KEY) from error
    required = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if len(required) == 1:
        return lambda logps, beta: function(margin(logps, beta))
    if len(required) == 2:
        return function
    wanted = "a loss takes (margin), or (logps, beta)"
    raise unusable(name, f"takes ({', '.join(required)}); {wanted}", key=_KEY)


def _try(name: str, loss: PairLoss) -> None:
    """Refuses what could not train: infinite, no gradient, of several pairs, the wrong direction."""
    gains = torch.tensor(_GAINS, dtype=torch.float64)
    real, generated = (gains[:, column].clone().requires_grad_() for column in (0, 1))
    nothing = torch.zeros(len(_GAINS), dtype=torch.float64)
    values = loss(PairLogps(real, generated, nothing, nothing), 1.0)
    if not bool(values.isfinite().all()):
        raise unusable(name, f"returned {values.tolist()} at margins 0, 2, -2", key=_KEY)
    if not values.requires_grad:
        raise _untrainable(name, "returned a tensor without gradient")
    by_real, by_generated = torch.autograd.grad(
        values[0], (real, generated), allow_unused=True, materialize_grads=True
    )
    if bool(by_real[1:].any() or by_generated[1:].any()):
        raise unusable(name, "mixes pairs: the value of one depends on another's margin", key=_KEY)
    slope = float(by_real[0] - by_generated[0])
    if not slope < 0.0:
        raise _untrainable(name, f"has slope {slope:g} where every iteration begins, at margin 0")


def _untrainable(name: str, found: str) -> ConfigError:
    return unusable(name, f"{found}; a loss falls as the margin grows", key=_KEY)
