"""Chats of random words as a JSONL file, and a tokenizer with a chat template that was trained on them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np

from examples.benchmarks.chat_lengths import PROMPT, RESPONSE, lengths

_WORDS = 4_000
_LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))
_FREQUENCY_EXPONENT = 1.0  # Zipf's
_TRAINING_CHATS = 500
_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def write_chats(path: Path, count: int, *, seed: int = 0, scale: float = 1.0) -> Path:
    """`count` chats of one prompt and one answer; lengths in words are log-normal."""
    generator = np.random.default_rng(seed)
    spelt = np.array(
        ["".join(generator.choice(_LETTERS, size)) for size in generator.integers(2, 10, _WORDS)]
    )
    share = 1 / np.arange(1, _WORDS + 1) ** _FREQUENCY_EXPONENT
    sizes = np.stack([lengths(generator, count, shape, scale) for shape in (PROMPT, RESPONSE)], axis=1)
    with path.open("w", encoding="utf-8") as stream:
        for row in sizes:
            prompt, answer = (
                " ".join(spelt[generator.choice(_WORDS, size, p=share / share.sum())]) for size in row
            )
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            stream.write(json.dumps({"messages": turns}) + "\n")
    return path


def write_tokenizer(directory: Path, chats: Path, *, vocabulary: int) -> Path:
    """A byte-level BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    with chats.open(encoding="utf-8") as stream:
        first = itertools.islice(stream, _TRAINING_CHATS)
        texts = [json.loads(line)["messages"][1]["content"] for line in first]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory
