"""Rules about how much of earlier iterations is mixed in."""

from __future__ import annotations

from nemo_spin.config.mistakes import Mistake, mistake
from nemo_spin.config.schema import Config

HISTORY_KEYS = ("spin.mixture", "spin.history")


def mixture_has_an_amount_for_each_age(config: Config) -> list[Mistake]:
    """Its length is that of the history and one; counts are whole; there is something of the newest."""
    mixture, history = config.spin.mixture, config.spin.history
    if mixture is None:
        return []
    found = None
    if len(mixture) != history + 1:
        found = f"{mixture} has {len(mixture)} values, with spin.history {history}"
    elif fractions := [amount for amount in mixture if amount > 1 and amount != int(amount)]:
        found = f"{mixture} has {fractions[0]}, neither a share nor a count"
    elif not mixture[0]:
        found = f"{mixture} leaves out an iteration's own answers"
    if found is None:
        return []
    return [
        mistake(
            "spin.mixture",
            found=found,
            rule="one amount for the iteration's own answers, above 0, and one for each of spin.history "
            "earlier ones: a share of the prompts up to 1, or a whole number of them",
            remedy=f"such as {[1.0] * (history + 1)}, which is all of them, as null is",
            also=("spin.history",),
        )
    ]
