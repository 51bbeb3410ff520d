"""Tiny models and demonstrations that tests (and scripts) make in a second or two.

The model is a real Llama with random weights and a real byte-level BPE tokenizer with a
chat template: two layers, hidden size 64, four heads of 32 channels (vLLM's CPU kernels take no
fewer), two key/value heads, 300 tokens.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCAB_SIZE = 300
PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_WORDS = ("red", "green", "blue", "seven", "horse", "river", "stone", "cloud", "apple", "wheel")


def demonstrations(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations with one right answer: say the words in reverse order."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        words = [chance.choice(_WORDS) for _ in range(chance.randint(2, 5))]
        prompt = f"Say backwards: {' '.join(words)}"
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": " ".join(reversed(words))},
        ]
        rows.append({"messages": messages})
    return rows


def write_demonstrations(path: Path, count: int, *, seed: int = 0) -> Path:
    """`demonstrations` as a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = demonstrations(count, seed=seed)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_tokenizer(directory: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """Trains a byte-level BPE tokenizer on the demonstrations; returns transformers' tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (message["content"] for row in demonstrations(500, seed=99) for message in row["messages"])
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        **({"chat_template": chat_template} if chat_template else {}),
    )
    tokenizer.save_pretrained(directory)
    return tokenizer


def write_model(directory: Path, *, seed: int = 0, **settings: Any) -> Path:
    """A Hugging Face directory of a random Llama with its tokenizer.

    Args:
        directory: Gets the files.
        seed: Of the weights.
        settings: Override entries of the model's configuration.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = write_tokenizer(directory)
    config = LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,  # the smallest that vLLM's CPU attention takes
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
            "initializer_range": 0.1,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **settings,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(torch.float32)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(directory)
    return directory
