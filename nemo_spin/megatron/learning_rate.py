"""The learning rate of an optimizer step, as a function of nothing but its number."""

from __future__ import annotations

import math

from nemo_spin.config.schema import SchedConfig


def learning_rate(step: int, *, num_steps: int, peak: float, sched: SchedConfig) -> float:
    """Linear warm-up to `peak`, then constant, or linear or cosine decay.

    Being stateless, it needs no checkpoint, and it restarts with every iteration.

    Args:
        step: Optimizer step, from 0. The first has a share of the peak, never 0.
        num_steps: Optimizer steps of the iteration; the last one is `num_steps - 1`.
        peak: Highest learning rate.
        sched: Shape, share of warm-up steps, and final rate as a share of the peak.
    """
    warmup = math.ceil(sched.warmup_ratio * num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if sched.name == "constant":
        return peak
    progress = (step - warmup) / max(num_steps - warmup, 1)
    decayed = 1.0 - progress if sched.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (sched.min_lr_ratio + (1.0 - sched.min_lr_ratio) * decayed)
