"""The seed of every single request."""

from __future__ import annotations

import hashlib


def request_seed(seed: int, iteration: int, row_id: str, sample: int) -> int:
    """The seed of one answer: 63 bits, from what identifies it and nothing else.

    Samplers share their noise between requests of equal seed, so each request has its
    own; and since it depends on neither batch nor shard, a row that is generated again
    gets the same request. PyTorch's CPU generator uses the lower 32 bits alone, so two
    rows in some ten thousand may share their noise there; their prompts differ.

    Args:
        seed: `seed` of the configuration.
        iteration: Number of the iteration.
        row_id: `id` of the prepared row.
        sample: Which of the row's answers.
    """
    identity = f"{seed}\x1f{iteration}\x1f{sample}\x1f{row_id}".encode()
    return int.from_bytes(hashlib.sha256(identity).digest()[:8], "little") >> 1
