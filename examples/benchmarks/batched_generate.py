"""`transformers` generate, in batches that are padded on the left: the peer of generation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

CACHES = ("dynamic", "static")


def answers_of(
    model: Any,
    prompts: Sequence[list[int]],
    *,
    batch_size: int,
    max_tokens: int,
    temperature: float,
    cache: str = CACHES[0],
) -> list[list[int]]:
    """The answers to all prompts, in their order, each up to its end token.

    The longest prompts come first, so that those of a batch are about as long as each other.

    Args:
        model: A `transformers` model; its configuration names the end and the padding token.
        prompts: Token ids.
        batch_size: Prompts answered together.
        max_tokens: An answer is cut after as many.
        temperature: 0 takes the likeliest token each time; else all tokens can be drawn.
        cache: How keys and values are kept, one of CACHES.
    """
    import torch

    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    end, pad = model.config.eos_token_id, model.config.pad_token_id
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = len(prompts[rows[0]])
        ids = torch.full((len(rows), width), pad)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, width - len(prompts[row]) :] = torch.tensor(prompts[row])
            mask[place, width - len(prompts[row]) :] = 1
        with torch.inference_mode():
            found = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_tokens,
                cache_implementation=cache,
                **(drawn if temperature else {"do_sample": False}),
            )
        for row, answer in zip(rows, found[:, width:].tolist(), strict=True):
            answers[row] = answer[: answer.index(end) + 1] if end in answer else answer
    return answers


def fastest(
    model: Any, prompts: Sequence[list[int]], batch_sizes: Sequence[int], **settings: Any
) -> tuple[dict[str, float], int, str]:
    """Tokens/s of every batch size and cache, and the fastest of both.

    Args:
        model: As for `answers_of`.
        prompts: As for `answers_of`: all of them are answered each time.
        batch_sizes: What is tried.
        **settings: As for `answers_of`.
    """
    rates: dict[tuple[int, str], float] = {}
    for batch_size in batch_sizes:
        for cache in CACHES:
            start = time.perf_counter()
            answers = answers_of(model, prompts, batch_size=batch_size, cache=cache, **settings)
            rates[batch_size, cache] = sum(map(len, answers)) / (time.perf_counter() - start)
    batch_size, cache = max(rates, key=rates.__getitem__)
    return {f"{size}, {kind}": rate for (size, kind), rate in rates.items()}, batch_size, cache
