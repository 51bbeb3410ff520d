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


OBJECTIVE_KEYS = (
    "spin.loss",
    "spin.length_normalized",
    "spin.label_smoothing",
    "spin.sft_weight",
    "spin.dpop_weight",
    "spin.opponent_mix",
)

# What the training step does not read yet. A key that would change nothing is refused.
_NOT_TRAINED_WITH_YET = OBJECTIVE_KEYS[1:]
_TRAINED_WITH = LOSS_NAMES[:4]


def objective_is_trained_with(config: Config) -> list[Mistake]:
    """Refuses objectives that are defined and tested, but not wired into training."""
    reason = "the training step does not use it yet"
    found = [
        mistake(key, found=_value(config, key), rule=reason, remedy=f"set it to {_value(Config(), key)}")
        for key in _NOT_TRAINED_WITH_YET
        if _value(config, key) != _value(Config(), key)
    ]
    if config.spin.loss not in _TRAINED_WITH and not loss_is_known_or_a_function(config):
        choices = ", ".join(_TRAINED_WITH)
        found.append(
            mistake(
                "spin.loss", found=repr(config.spin.loss), rule=reason, remedy=f"set it to one of {choices}"
            )
        )
    return found


def _value(config: Config, key: str) -> object:
    return getattr(config.spin, key.removeprefix("spin."))
