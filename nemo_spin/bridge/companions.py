"""What an export takes over from its source beside the weights: configuration, tokenizer, licence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_spin.bridge.hf_config import CONFIG_NAME, GENERATION_CONFIG_NAME, read_json
from nemo_spin.bridge.safetensors_format import DTYPE_OF
from nemo_spin.errors import CheckpointError, explain

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_FIXED = (CONFIG_NAME, GENERATION_CONFIG_NAME, *TOKENIZER_FILES)
_PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "additional_chat_templates/*.jinja")
_HUB_STORE = "blobs"  # the hub's cache links to files there, named by their hashes


def companions(source_dir: Path) -> Iterator[Path]:
    """The files to copy, as they lie in `source_dir`; code is never among them."""
    yield from (source_dir / name for name in _FIXED if (source_dir / name).is_file())
    for pattern in _PATTERNS:
        yield from (path for path in sorted(source_dir.glob(pattern)) if path.is_file())


def refuse_strange_links(source_dir: Path) -> None:
    """Refuses links by which a stranger's directory would put a private file into an export.

    A link may lead to a file of the same name, or into the hub's cache: not from `LICENSE` to
    somebody's keys.

    Raises:
        CheckpointError: There is such a link.
    """
    for path in companions(source_dir):
        target = path.resolve()
        if path.is_symlink() and target.name != path.name and target.parent.name != _HUB_STORE:
            raise CheckpointError(
                explain(
                    str(path),
                    found=f"is a link to {target}",
                    rule="what is copied into exports is a file, or a link to one of the same name",
                    remedy="put a copy of the file there, or remove the link",
                )
            )


def copy_companions(source_dir: Path, directory: Path, *, dtype: str) -> None:
    """Copies configuration, tokenizer, chat template and licence; code is never copied.

    The configuration's dtype is changed where the export has another.

    Raises:
        CheckpointError: One is a link to something else.
    """
    refuse_strange_links(source_dir)
    for path in companions(source_dir):
        target = directory / path.relative_to(source_dir)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    config = read_json(source_dir / CONFIG_NAME)
    if _config_dtype(config) not in (None, dtype):
        key = "dtype" if "dtype" in config else "torch_dtype"
        config[key] = next(name for name, spelt in DTYPE_OF.items() if spelt == dtype)
        (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _config_dtype(config: Mapping[str, Any]) -> str | None:
    name = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    return DTYPE_OF.get(name)
