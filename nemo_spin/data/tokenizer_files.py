"""Reads a model directory's tokenizer, without running code from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_spin.errors import ConfigError, explain


def load_tokenizer(model_dir: Path) -> Any:
    """The `transformers` tokenizer of a local directory; runs no code from it.

    Raises:
        ConfigError: There is none, or it cannot be read.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(40)  # logging.ERROR
    try:
        return AutoTokenizer.from_pretrained(str(model_dir), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a broken tokenizer file makes transformers raise
        raise ConfigError(
            explain(
                f"model.path={model_dir}",
                found=f"its tokenizer cannot be read ({(str(error).strip().splitlines() or [type(error).__name__])[0][:200]})",
                rule="a Hugging Face directory with a tokenizer that needs no code of its own",
                remedy="copy the tokenizer files of the model again (tokenizer.json, tokenizer_config.json)",
            )
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def generation_eos_ids(model_dir: Path) -> list[int]:
    """`eos_token_id` of `generation_config.json`: one id, several, or none."""
    path = model_dir / "generation_config.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except FileNotFoundError:
        return []
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            explain(
                str(path),
                found=f"is not a JSON object ({error})",
                rule="generation_config.json as `transformers` writes it",
                remedy="copy the file again, or remove it",
            )
        ) from error
    values = value if isinstance(value, list) else [value]
    return [token for token in values if isinstance(token, int)]
