"""Megatron's optimizer in the shape that Lightning's training loop expects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nemo_spin.megatron.engine import Engine


class MegatronOptimizerAdapter(torch.optim.Optimizer):
    """Runs the step's closure (forward and backward), then Megatron's optimizer.

    Args:
        engine: Holds the optimizer.
        learning_rate: Gives the rate of the step that is about to be made.
    """

    def __init__(self, engine: Engine, learning_rate: Callable[[], float]) -> None:
        # Lightning wants a parameter to look at; the real groups are Megatron's.
        super().__init__([nn.Parameter(torch.empty(0))], {"lr": 0.0})
        self._engine = engine
        self._learning_rate = learning_rate
        self.grad_norm = float("nan")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step of all ranks."""
        result = closure() if closure is not None else None
        rate = self._learning_rate()
        self.param_groups[0]["lr"] = rate
        with self._engine.meter.phase("optimizer"):
            self.grad_norm = self._engine.update(rate)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The engine clears gradients before it computes new ones."""
