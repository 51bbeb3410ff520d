"""Values of config.json, checked: a wrong one is refused by its key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nemo_spin.errors import CheckpointError, explain

_MEND = "mend config.json or download the model again"


def refuse(key: str, value: object, rule: str, remedy: str = "choose a model without it") -> CheckpointError:
    """The error for a property of config.json that cannot be expressed."""
    error = CheckpointError(explain(f"config.json: {key}", found=repr(value), rule=rule, remedy=remedy))
    error.key = key
    return error


def count(values: Mapping[str, Any], key: str) -> int:
    """A positive whole number."""
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise refuse(key, value, "is a positive whole number", _MEND)
    return value


def flag(values: Mapping[str, Any], key: str) -> bool:
    """True or false; left out or null means false."""
    value = values.get(key)
    if value not in (True, False, None):
        raise refuse(key, value, "is true or false", _MEND)
    return bool(value)


def number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number, which must be there unless there is a default."""
    value = values.get(key, default)
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not math.isfinite(value)
        or value <= 0
    ):
        raise refuse(key, value, "is a positive number", _MEND)
    return float(value)


def optional_number(values: Mapping[str, Any], key: str) -> float | None:
    """A positive number, or None where it is left out or null."""
    return None if values.get(key) is None else number(values, key)


def choice(values: Mapping[str, Any], key: str, allowed: tuple[Any, ...]) -> Any:
    """One of the values that can be expressed."""
    value = values.get(key)
    if value not in allowed:
        rule = f"of {key} only {' | '.join(str(entry) for entry in allowed)} is supported"
        raise refuse(key, value, rule)
    return value
