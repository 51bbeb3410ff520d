"""Rules about the thresholds of guards."""

from __future__ import annotations

from nemo_spin.config.mistakes import Mistake, mistake
from nemo_spin.config.rules import GUARDS, LOW_GUARDS
from nemo_spin.config.schema import Config

GUARD_KEYS = tuple(f"selfplay.guards.{name}.{level}" for name in GUARDS for level in ("warn", "stop"))


def a_guard_warns_before_it_stops(config: Config) -> list[Mistake]:
    """Where both thresholds are given, the value passes that of the warning first."""
    found = []
    for name in GUARDS:
        thresholds = getattr(config.selfplay.guards, name)
        warn, stop = thresholds.warn, thresholds.stop
        if warn is None or stop is None or (warn >= stop if name in LOW_GUARDS else warn <= stop):
            continue
        side = "at most" if name in LOW_GUARDS else "at least"
        found.append(
            mistake(
                f"selfplay.guards.{name}.stop",
                found=f"{stop}, with a warning at {warn}",
                rule=f"a guard warns before it stops: {side} selfplay.guards.{name}.warn",
                remedy=f"set it to {warn} or beyond, or to null to warn only",
                also=(f"selfplay.guards.{name}.warn",),
            )
        )
    return found
