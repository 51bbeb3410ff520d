"""Turns nested mappings into the schema's dataclasses, collecting every mistake.

Stricter than YAML and kinder than a traceback: unknown keys are named with the nearest
known one, and a value of a wrong type with the type that is wanted.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any

from omegaconf import MISSING

from nemo_spin.config.mistakes import Mistake, mistake, nearest
from nemo_spin.config.schema import Config


@dataclasses.dataclass(frozen=True)
class Unresolved:
    """Stands for a value whose `${interpolation}` could not be resolved."""

    text: str
    reason: str


_NO_DEFAULT = object()


class _WrongTypeError(Exception):
    """A value cannot become what the schema wants."""


@functools.cache
def fields_of(section: type) -> dict[str, Any]:
    """Key -> type of a section of the schema."""
    hints = typing.get_type_hints(section)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


@functools.cache
def leaf_types(section: type = Config, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> type of every value below `section`."""
    leaves: dict[str, Any] = {}
    for name, hint in fields_of(section).items():
        if dataclasses.is_dataclass(hint):
            leaves |= leaf_types(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            leaves[prefix + name] = hint
    return leaves


def build(
    values: Mapping[Any, Any], *, origins: Mapping[str, str] | None = None
) -> tuple[Config, list[Mistake]]:
    """The configuration that `values` describe, and everything that is wrong with them.

    Args:
        values: Nested mappings by the schema's keys; what is not there has its default.
        origins: Dotted key -> the override that set it, for the messages.

    Returns:
        The configuration (with the default where a value is mistaken) and the mistakes.
    """
    builder = _Builder(origins or {})
    return builder.section(Config(), values, ""), builder.mistakes


class _Builder:
    def __init__(self, origins: Mapping[str, str]) -> None:
        self.mistakes: list[Mistake] = []
        self._origins = origins

    def section(self, default: Any, values: Any, key: str) -> Any:
        """The dataclass instance `default` with what `values` gives; wrong values are left as they are."""
        section: type = type(default)
        if values is None or values == MISSING:  # an empty section of a YAML file
            return default
        if not isinstance(values, Mapping):
            self._wrong(
                key, values, f"is a section, with the keys {', '.join(fields_of(section))}", _NO_DEFAULT
            )
            return default
        hints = fields_of(section)
        given = {}
        for name, value in values.items():
            path = f"{key}.{name}" if key else str(name)
            if name not in hints:
                self._unknown(path, str(name), section, key)
            elif dataclasses.is_dataclass(hints[name]):
                given[name] = self.section(getattr(default, name), value, path)
            else:
                try:
                    given[name] = _convert(value, hints[name])
                except _WrongTypeError:
                    self._wrong(path, value, f"must be {describe(hints[name])}", getattr(default, name))
        return dataclasses.replace(default, **given)

    def _wrong(self, key: str, value: Any, rule: str, default: Any) -> None:
        if isinstance(value, Unresolved):
            found, rule, remedy = value.text, value.reason, "set what it refers to, or write the value itself"
        else:
            found = repr(value) if value is not None else "null"
            if default == MISSING:
                remedy = f"give {key} a value of that kind"
            elif default is _NO_DEFAULT:
                remedy = f"set single keys, as in {key}.KEY=value"
            else:
                remedy = f"such as its default, {_shown(default)}"
        self.mistakes.append(mistake(key, found=found + self._origin(key), rule=rule, remedy=remedy))

    def _unknown(self, path: str, name: str, section: type, key: str) -> None:
        place = f"`{key}`" if key else "the top level"
        known = ", ".join(fields_of(section))
        if path in leaf_types():  # a dotted key in a file: what it means is known, it is not read as that
            remedy = "write the sections as nested mappings; dotted keys are for the command line"
            self.mistakes.append(
                mistake(path, found=f"is one key, {name!r}", rule="keys have no dots", remedy=remedy)
            )
            return
        guess = _nearest_key(path, name, section)
        self.mistakes.append(
            mistake(
                path,
                found="unknown key" + self._origin(path),
                rule="only the keys of the schema can be set, all of which `nemo-spin validate-config` prints"
                if guess
                else f"the keys of {place} are {known}",
                remedy=f"did you mean `{guess}`?" if guess else "remove it, or use one of these",
            )
        )

    def _origin(self, key: str) -> str:
        candidates = [line for name, line in self._origins.items() if f"{key}.".startswith(f"{name}.")]
        candidates = candidates or [
            line for name, line in self._origins.items() if name.startswith(f"{key}.")
        ]
        return f" (from the override {candidates[-1]!r})" if candidates else ""


def _nearest_key(path: str, name: str, section: type) -> str | None:
    """Where an unknown key probably belongs: beside it, or under the same name elsewhere."""
    prefix = path[: len(path) - len(name)]
    sibling = nearest(name, fields_of(section), cutoff=0.7)
    if sibling:
        return prefix + sibling
    leaves = list(leaf_types())
    for leaf in leaves:
        if leaf.rpartition(".")[2] == name:
            return leaf
    return nearest(path, leaves, cutoff=0.75) or next(
        (prefix + key for key in [nearest(name, fields_of(section), cutoff=0.55)] if key), None
    )


def describe(hint: Any) -> str:
    """A type of the schema in words."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(describe(arm) for arm in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return f"a list, each value {describe(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is dict:
        return "a mapping"
    return {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        type(None): "null",
    }.get(hint, "a number, or a list with one number for each iteration")


def _shown(value: Any) -> str:
    return (
        {None: "null", True: "true", False: "false"}[value]
        if value is None or isinstance(value, bool)
        else str(value)
    )


def _convert(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`; texts that spell a number or a truth value are read as such.

    Raises:
        _WrongTypeError: It cannot be.
    """
    if isinstance(value, Unresolved):
        raise _WrongTypeError
    if hint is Any:
        return _spelt(value)
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert(value, next(arm for arm in arguments if arm is not type(None)))
    if kind is list and isinstance(value, (list, tuple)):
        return [_convert(entry, arguments[0]) for entry in value]
    if kind is dict and isinstance(value, Mapping):
        return {str(key): entry for key, entry in value.items()}
    if kind is not None:
        raise _WrongTypeError
    return value if value == MISSING else _SCALARS[hint](value)


def _whole(value: Any) -> int:
    number = _number(value)
    if not number.is_integer():
        raise _WrongTypeError
    return value if isinstance(value, int) else int(value) if _is_digits(value) else int(number)


def _is_digits(value: Any) -> bool:
    return isinstance(value, str) and value.strip().lstrip("+-").isdecimal()


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise _WrongTypeError
    try:
        return float(value)
    except (ValueError, OverflowError) as error:
        raise _WrongTypeError from error


def _truth(value: Any) -> bool:
    spelt = {"true": True, "false": False}.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(spelt, bool):
        raise _WrongTypeError
    return spelt


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise _WrongTypeError
    return str(value)


def _spelt(value: Any) -> Any:
    """A value of any type; a number that came as a text (from the environment) is read."""
    if isinstance(value, (list, tuple)):
        return [_spelt(entry) for entry in value]
    if isinstance(value, str):
        try:
            return int(value) if _is_digits(value) else float(value)
        except ValueError:
            return value
    return value


_SCALARS = {int: _whole, float: _number, bool: _truth, str: _text}
