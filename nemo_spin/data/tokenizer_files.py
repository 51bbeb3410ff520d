"""Reads a model directory's tokenizer and chat template, without running code from it."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

from nemo_spin.errors import ConfigError, explain

# Templates that write today's date get this one (Llama 3's own fallback): the same rows
# must become the same ids on every day.
_TODAY = datetime.datetime(2024, 7, 26)
_DATE_CODES = "aAbBcdDeFHIjmMpSTuUwxXyY"


def load_tokenizer(model_dir: Path) -> Any:
    """The `transformers` tokenizer of a local directory; runs no code from it.

    Raises:
        ConfigError: There is none, or it cannot be read.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    from transformers import AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(40)  # logging.ERROR
    try:
        return AutoTokenizer.from_pretrained(str(model_dir), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a broken tokenizer file makes transformers raise
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError(
            explain(
                f"model.path={model_dir}",
                found=f"its tokenizer cannot be read ({said})",
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


def read_chat_template(tokenizer: Any) -> str:
    """The tokenizer's (default) chat template.

    Raises:
        ConfigError: It has none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            explain(
                "data.prompt_template=null",
                found="the tokenizer of model.path has no chat template",
                rule="a prompt is made by the tokenizer's chat template or by data.prompt_template",
                remedy="set data.prompt_template, such as "
                r'"### Instruction: {prompt}\n\n### Response: ", or add a chat_template.jinja',
            )
        )
    try:
        return with_fixed_date(tokenizer.get_chat_template())
    except ValueError as error:  # several templates, and none is the default
        raise bad_chat_template(str(error)) from error


def with_fixed_date(chat_template: str) -> str:
    """`chat_template` with `strftime_now`, if it uses it, saying the same on every day."""
    if "strftime_now" not in chat_template:
        return chat_template
    replacements = "".join(f".replace('%{code}', '{_TODAY.strftime('%' + code)}')" for code in _DATE_CODES)
    macro = "{%- macro strftime_now(format) -%}{{- format" + replacements + " -}}{%- endmacro %}"
    return macro + "{{ '' }}" + chat_template  # the '' keeps a newline that the template begins with


def bad_chat_template(found: str) -> ConfigError:
    """Words that a chat template is there but cannot be used."""
    return ConfigError(
        explain(
            "data.prompt_template=null",
            found=f"the chat template of model.path cannot be used ({found})",
            rule="a chat template renders a user's message and the assistant's answer",
            remedy="mend the chat template, or set data.prompt_template",
        )
    )
