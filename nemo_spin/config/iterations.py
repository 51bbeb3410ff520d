"""Settings that may differ between the iterations of self-play."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from nemo_spin.config.mistakes import Mistake
from nemo_spin.config.schema import Config, SpinConfig
from nemo_spin.config.typed import build

T = TypeVar("T")

# Every model of a run is evaluated with the sampling of this iteration, whatever its own is:
# scores are compared, by `selfplay.keep` and by guards.
EVALUATED_AS = 0


def at_iteration(value: T | Sequence[T], iteration: int) -> T:
    """The value that holds in `iteration`, counted from 0.

    Args:
        value: A scalar, which holds in all of them, or a list with one value for each
            (`nemo_spin.config.validate` has checked its length).
        iteration: Number of the iteration.
    """
    if not isinstance(value, (list, tuple)):
        return value  # type: ignore[return-value]  # a Sequence[T] is a list or a tuple here
    assert 0 <= iteration < len(value), f"iteration {iteration} of a list of {len(value)}"
    chosen: T = value[iteration]
    return chosen


def mixed_iterations(spin: SpinConfig, iteration: int) -> list[int]:
    """The iterations whose generations `iteration` trains on: `spin.history` earlier ones, and its own."""
    return list(range(max(0, iteration - spin.history), iteration + 1))


def config_at(config: Config, iteration: int | None) -> Config:
    """The configuration of one iteration: with what `spin.per_iteration` changes in it.

    Args:
        config: A configuration that was checked.
        iteration: Counted from 0; None (theta_0, plain fine-tuning) has the settings of the first.
    """
    changes = config.spin.per_iteration.get(str(iteration or 0))
    if not changes:
        return config
    changed, mistakes = with_changes(config, changes)
    assert not mistakes, "validated before: " + "; ".join(entry.text for entry in mistakes)
    return changed


def with_changes(config: Config, changes: Mapping[str, Any]) -> tuple[Config, list[Mistake]]:
    """`config` with other values of the dotted keys in `changes`, and what is wrong with their types."""
    values = dataclasses.asdict(config)
    values["spin"]["per_iteration"] = {}
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = values
        for part in sections:
            section = section[part]
        section[name] = value
    return build(values)
