"""Rules about the objective: `spin.loss` and the options that combine with it."""

from __future__ import annotations

from nemo_spin.config.functions import names_a_function
from nemo_spin.config.mistakes import Mistake, mistake, nearest
from nemo_spin.config.schema import Config

# The paper's losses (objective/losses.py), then the ones of objective/neighbours.py.
LOSS_NAMES = ("logistic", "hinge", "exponential", "correlation", "ipo", "nca")


def loss_is_known_or_a_function(config: Config) -> list[Mistake]:
    """`spin.loss` is one of ours or has the form of a function's name."""
    loss = config.spin.loss
    if loss in LOSS_NAMES or names_a_function(loss):
        return []
    guess = nearest(loss, LOSS_NAMES)
    return [
        mistake(
            "spin.loss",
            found=repr(loss),
            rule=f"must be {' or '.join(LOSS_NAMES)}, or a function of your own "
            "(package.module:function or path/to/file.py:function)",
            remedy=f"did you mean `{guess}`?" if guess else "set spin.loss to one of these",
        )
    ]
