"""Random small checkpoints of every family, made by `transformers` from its own classes."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}
COMMON = {  # odd on purpose: nothing is a power of two, the vocabulary is prime
    "vocab_size": 89,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEAD_DIMS = {"llama": 8, "mistral": 10, "qwen3": 6}  # 6 heads of them are not the hidden size


def config_of(family: str, **settings: Any) -> Any:
    """A configuration of the family, by its own class."""
    values = {**COMMON, **settings}
    if family in HEAD_DIMS:
        values.setdefault("head_dim", HEAD_DIMS[family])
    if family == "llama" and values["hidden_size"] % values["num_attention_heads"]:
        raise ValueError("transformers' Llama wants hidden_size divisible by the heads")
    return getattr(transformers, f"{CLASSES[family]}Config")(**values)


@functools.cache
def _saved(family: str, dtype: str, shard_size: str, settings: str) -> Path:
    torch.manual_seed(11)
    config = config_of(family, **json.loads(settings))
    model = getattr(transformers, f"{CLASSES[family]}ForCausalLM")(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: all would be 0 or 1
            parameter.normal_(std=0.3).add_(0.01)
    directory = Path(tempfile.mkdtemp(prefix="nemo_spin-checkpoint-"))
    model.save_pretrained(directory, max_shard_size=shard_size)
    return directory


def make_checkpoint(
    directory: Path, family: str = "llama", *, dtype: str = "float32", shards: bool = False, **settings: Any
) -> Path:
    """Saves a random model of the family into `directory` (a copy of one made before)."""
    source = _saved(family, dtype, "20KB" if shards else "1GB", json.dumps(settings, sort_keys=True))
    shutil.copytree(source, directory, dirs_exist_ok=True)
    return directory


def edit_config(directory: Path, *, remove: tuple[str, ...] = (), **values: Any) -> Path:
    """Changes keys of config.json."""
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in remove}))
    return directory
