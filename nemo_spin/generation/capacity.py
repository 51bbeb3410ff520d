"""How much a sampler must hold: context lengths and memory for keys and values."""

from __future__ import annotations

import os
from pathlib import Path

from nemo_spin.errors import GenerationError, explain

_BLOCK_TOKENS = 128  # the CPU engine hands out its cache in blocks of as many tokens
_SPARE_BLOCKS = 2  # one is never used, one is for rounding
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
_MEMORY_SHARE = 4  # the cache takes a quarter of the machine's memory at most


def kv_cache_bytes(
    *, dtype: str, kv_numbers_per_token: int, max_model_len: int, max_num_seqs: int, memory_bytes: int
) -> int:
    """Memory for the keys and values of `max_num_seqs` answers, within a quarter of the machine.

    Engines left alone take far more and need long to clear it. With less than all answers
    need, some wait for others: slower, the same answers.

    Args:
        dtype: Type of the cached numbers.
        kv_numbers_per_token: Numbers cached for a token on one device.
        max_model_len: Tokens of the longest prompt and its answer.
        max_num_seqs: Answers drawn at the same time.
        memory_bytes: Of the machine.

    Raises:
        GenerationError: Not even one answer fits.
    """
    block_bytes = _BLOCK_TOKENS * kv_numbers_per_token * _BYTES[dtype]
    blocks_per_answer = -(-max_model_len // _BLOCK_TOKENS)
    least = (blocks_per_answer + _SPARE_BLOCKS) * block_bytes
    wanted = (blocks_per_answer * max_num_seqs + _SPARE_BLOCKS) * block_bytes
    cap = memory_bytes // _MEMORY_SHARE
    if least > cap:
        raise GenerationError(
            explain(
                "generation.kv_cache_gib=null",
                found=f"an answer of {max_model_len} tokens needs {least / 2**30:.2f} GiB of keys and values",
                rule=f"the sampler takes a quarter of the machine's memory at most ({cap / 2**30:.2f} GiB)",
                remedy="set generation.kv_cache_gib yourself, or shorten generation.max_tokens "
                "and data.max_prompt_length",
            )
        )
    return min(wanted, cap)


def memory_bytes() -> int:
    """Memory of this machine, or of the container where that is less; used or not."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = _CONTAINER_LIMIT.read_text().strip()
    except OSError:
        return machine
    return min(machine, int(limit)) if limit.isdecimal() else machine
