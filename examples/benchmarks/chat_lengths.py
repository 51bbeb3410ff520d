"""Pairs whose lengths are distributed like those of chat data, with random tokens."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

# Log-normal in tokens: (median, sigma of the logarithm, least, most); drawn again outside the range.
PROMPT = (180.0, 0.9, 30, 1000)
RESPONSE = (250.0, 0.7, 50, 1000)
_IDS = pa.list_(pa.int32())


def lengths(
    generator: np.random.Generator, count: int, shape: tuple[float, float, int, int], scale: float = 1.0
) -> np.ndarray:
    """[count] int64 lengths of `shape`, all of them times `scale`."""
    median, sigma, least, most = shape
    drawn = np.empty(0)
    while len(drawn) < count:
        more = generator.lognormal(np.log(median), sigma, 2 * count)
        drawn = np.concatenate([drawn, more[(more >= least) & (more <= most)]])
    return np.maximum(drawn[:count] * scale, 1).astype(np.int64)


def chat_pairs(count: int, *, vocabulary: int, seed: int = 0, scale: float = 1.0) -> pa.Table:
    """`count` rows of a prompt, a real and a generated response, with an opponent's values."""
    generator = np.random.default_rng(seed)
    sizes = [lengths(generator, count, shape, scale) for shape in (PROMPT, RESPONSE, RESPONSE)]
    return random_pairs(np.stack(sizes, axis=1), vocabulary=vocabulary, generator=generator)


def random_pairs(sizes: np.ndarray, *, vocabulary: int, generator: np.random.Generator) -> pa.Table:
    """Rows of random tokens, with an opponent's values.

    Args:
        sizes: [rows, 3] tokens of prompt, real and generated response.
        vocabulary: Token ids are below it.
        generator: Draws them.
    """
    columns = {
        name: pa.array([generator.integers(0, vocabulary, size).astype(np.int32) for size in column], _IDS)
        for name, column in zip(("prompt_ids", "real_ids", "generated_ids"), sizes.T, strict=True)
    }
    nats = float(np.log(vocabulary))  # a token of a model that knows nothing
    opponent = {
        f"opponent_{kind}_logps": pa.array(-nats * column)
        for kind, column in zip(("real", "generated"), sizes.T[1:], strict=True)
    }
    return pa.table({**columns, **opponent})
