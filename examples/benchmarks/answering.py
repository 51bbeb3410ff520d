"""What a pipeline from text to text needs: chats, a tokenizer, and a Llama whose answers end.

Weights are random, but the logit of the end token is raised until every token drawn at temperature 1
is the end with a chance of 1 in `mean_tokens`: lengths of answers differ as those of a trained model
do. A token is a word, so that answers that become text and tokens again are the same tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from examples.benchmarks.chat_lengths import PROMPT, RESPONSE, lengths
from examples.benchmarks.small_llama import write_llama

PAD, USER, ASSISTANT, END = _SPECIAL = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")
END_ID = _SPECIAL.index(END)
FIRST_WORD_ID = len(_SPECIAL)
_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_ANCHOR = 1.0  # of the first hidden number in every embedding: the end's logit hangs on it
_TRIALS = 50  # halvings of an interval


def write_answering_llama(
    directory: Path, *, vocabulary: int, hidden: int, layers: int, mean_tokens: float
) -> Path:
    """A float32 Llama with random weights.

    Args:
        directory: Gets the Hugging Face checkpoint.
        vocabulary: Number of tokens.
        hidden: Hidden size.
        layers: Number of layers.
        mean_tokens: Of its answers at temperature 1, the end included; 0: hardly any of them ends.
    """
    import torch
    from transformers import LlamaForCausalLM

    write_llama(directory, vocabulary=vocabulary, hidden=hidden, layers=layers)
    model = LlamaForCausalLM.from_pretrained(directory)
    model.config.bos_token_id = model.generation_config.bos_token_id = None
    model.config.eos_token_id = model.generation_config.eos_token_id = END_ID
    model.config.pad_token_id = model.generation_config.pad_token_id = 0
    if mean_tokens:
        with torch.no_grad():
            _let_answers_end(model, mean_tokens)
    model.save_pretrained(directory)
    return directory


def _let_answers_end(model: Any, mean_tokens: float) -> None:
    """Sets the end token's row of the output layer, by halving an interval."""
    import torch

    model.model.embed_tokens.weight[:, 0] = _ANCHOR
    ids = torch.randint(FIRST_WORD_ID, model.config.vocab_size, (8, 128))
    states = model.model(ids).last_hidden_state.flatten(0, 1)
    row = model.lm_head.weight[END_ID]
    row.zero_()
    logits = model.lm_head(states)
    others = torch.cat([logits[:, :END_ID], logits[:, END_ID + 1 :]], dim=1).logsumexp(dim=1)
    low, high = 0.0, 100.0 / float(states[:, 0].mean())
    for _ in range(_TRIALS):
        weight = (low + high) / 2
        ends = torch.sigmoid(weight * states[:, 0] - others).mean()
        low, high = (weight, high) if ends < 1 / mean_tokens else (low, weight)
    row[0] = weight


def write_word_tokenizer(directory: Path, *, vocabulary: int) -> Path:
    """A chat template, and the words w4, w5 … for the ids behind those of the special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*_SPECIAL, *(f"w{number}" for number in range(FIRST_WORD_ID, vocabulary))]
    ids = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=_TEMPLATE,
    ).save_pretrained(directory)
    return directory


def write_word_chats(path: Path, count: int, *, vocabulary: int, seed: int, scale: float) -> Path:
    """`count` chats of a prompt and an answer in random words; lengths are log-normal."""
    generator = np.random.default_rng(seed)
    sizes = np.stack([lengths(generator, count, shape, scale) for shape in (PROMPT, RESPONSE)], axis=1)
    with path.open("w", encoding="utf-8") as stream:
        for row in sizes:
            prompt, answer = (
                " ".join(f"w{number}" for number in generator.integers(FIRST_WORD_ID, vocabulary, size))
                for size in row
            )
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            stream.write(json.dumps({"messages": turns}) + "\n")
    return path
