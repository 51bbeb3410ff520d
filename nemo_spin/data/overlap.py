"""Held-out prompts that are training prompts too: what is measured on them was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

_HASH_BYTES = 8  # two of a billion prompts share theirs with a probability of 3%


def prompt_hashes(texts: Iterable[str]) -> bytes:
    """`_HASH_BYTES` for each rendered prompt, one after the other; the same in every process."""
    return b"".join(hashlib.blake2b(text.encode(), digest_size=_HASH_BYTES).digest() for text in texts)


class PromptOverlap:
    """Counts them; holds 8 bytes for each row."""

    def __init__(self) -> None:
        self._hashes = {"train": bytearray(), "heldout": bytearray()}

    def add(self, split: str, hashes: bytes) -> None:
        """Takes the `prompt_hashes` of further rows."""
        self._hashes[split] += hashes

    def count(self) -> int:
        """Held-out rows with the prompt of a training row."""
        train, heldout = (np.frombuffer(self._hashes[split], np.uint64) for split in ("train", "heldout"))
        train.sort()  # in place: the buffer is this object's own
        places = np.searchsorted(train, heldout)
        inside = places < train.size
        return int((train[places[inside]] == heldout[inside]).sum())
