"""Mistakes of a user are collected, and reported together."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nemo_spin.errors import ConfigError, explain


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong.

    Attributes:
        keys: Every key whose value plays a part, dotted. A key with a mistake of its own
            makes rules about several keys pointless: they are not reported as well.
        text: The message, worded by `explain`.
    """

    keys: tuple[str, ...]
    text: str


def mistake(key: str, *, found: object, rule: str, remedy: str, also: Sequence[str] = ()) -> Mistake:
    """A mistake at `key`, in which the keys `also` play a part."""
    return Mistake((key, *also), explain(key, found=found, rule=rule, remedy=remedy))


def mistaken_keys(mistakes: Iterable[Mistake]) -> set[str]:
    """All keys that have a mistake."""
    return {key for entry in mistakes for key in entry.keys}


def touches(keys: Iterable[str], mistaken: set[str]) -> bool:
    """Whether one of `keys`, or a section around it, is among the mistaken ones."""
    return any(key == bad or key.startswith(bad + ".") for key in keys for bad in mistaken)


def raise_together(mistakes: Sequence[Mistake]) -> None:
    """Raises one error that lists every mistake; returns where there is none.

    Raises:
        ConfigError: There is at least one mistake.
    """
    texts = list(dict.fromkeys(entry.text for entry in mistakes))
    if len(texts) == 1:
        raise ConfigError(texts[0])
    if texts:
        raise ConfigError(
            f"{len(texts)} mistakes in the configuration\n" + "\n".join(f"- {text}" for text in texts)
        )


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The known word that looks most like `word`, or None where none does."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None
