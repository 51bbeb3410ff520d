"""Texts to token ids, and to nothing that a tokenizer finds out besides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_PROBES = ["What's new?\n", " two  spaces", "\u00e9\u4f60 \U0001f600", "<s>[INST]</s>", ""]

TokenIds = Callable[[list[str]], list[list[int]]]


def token_ids_of(tokenizer: Any) -> TokenIds:
    """A function from texts to their ids, without special tokens around them.

    `transformers` has its library find the place of every token in the text too, and wraps each
    text's result. Where the library's call for ids alone gives the same, it is used directly.

    Args:
        tokenizer: A `transformers` tokenizer; nothing else may change its settings.
    """

    def whole(texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoding = tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids: list[list[int]] = encoding["input_ids"]
        return ids

    encode: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "encode_batch_fast", None)
    if encode is None:
        return whole

    def alone(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in encode(texts, add_special_tokens=False)]

    expected = whole(_PROBES)  # it also sets the library to cut and to pad nothing
    return alone if alone(_PROBES) == expected else whole
