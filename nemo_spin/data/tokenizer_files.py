"""Reads a model directory's tokenizer and chat template, without running code from it."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_spin.errors import ConfigError, explain

# Templates that write today's date get this one (Llama 3's own fallback): the same rows
# must become the same ids on every day.
_TODAY = datetime.datetime(2024, 7, 26)
_DATE_CODES = "aAbBcdDeFHIjmMpSTuUwxXyY"
_CONFIGS = ("tokenizer_config.json", "config.json")
_NEVER_OPENED = "special_tokens_map_file"  # where older versions found it; it may still be there


def load_tokenizer(model_dir: Path) -> Any:
    """The `transformers` tokenizer of a local directory; runs no code from it.

    Raises:
        ConfigError: There is none, or it cannot be read.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    for name in _CONFIGS:
        _refuse_detours(model_dir, name)
    from transformers import AutoTokenizer

    try:
        with _quiet_transformers():
            return AutoTokenizer.from_pretrained(
                str(model_dir), trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # whatever a broken tokenizer file makes transformers raise
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise _unusable(
            model_dir,
            f"its tokenizer cannot be read ({said})",
            "copy the tokenizer files of the model again (tokenizer.json, tokenizer_config.json)",
        ) from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No warnings, and no question on the terminal whether to run a stranger's code.

    A tokenizer that consists of others loads these without passing `trust_remote_code` on.
    """
    from transformers import dynamic_module_utils
    from transformers.utils import logging

    verbosity, patience = logging.get_verbosity(), dynamic_module_utils.TIME_OUT_REMOTE_CODE
    logging.set_verbosity(40)  # logging.ERROR
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = patience


def _refuse_detours(model_dir: Path, name: str) -> None:
    """Refuses a configuration that names a class that is no tokenizer, or a file elsewhere.

    `transformers` looks `tokenizer_class` up among all it has, models that read pickles included,
    and some versions open whatever file is named here.

    Raises:
        ConfigError: It does.
    """
    import transformers

    try:
        values = json.loads((model_dir / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # missing or broken: `transformers` says so
    if not isinstance(values, dict):
        return
    class_name, named = values.get("tokenizer_class"), None
    if isinstance(class_name, str):
        with contextlib.suppress(ImportError, RuntimeError):  # a class whose packages are broken
            named = getattr(transformers, class_name, None)
    is_tokenizer = isinstance(named, type) and (
        issubclass(named, transformers.PreTrainedTokenizerBase)
        or type(named).__name__ == "DummyObject"  # says which package it lacks
    )
    if named is not None and not is_tokenizer:
        raise _unusable(model_dir, f"{name} says tokenizer_class {class_name}, which is no tokenizer")
    for key, value in values.items():
        if not key.endswith(("_file", "_files")) or key == _NEVER_OPENED:
            continue
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, str) and _is_elsewhere(model_dir, path):
                raise _unusable(model_dir, f"{name} says {key} {path}, a file outside of the directory")


def _is_elsewhere(model_dir: Path, path: str) -> bool:
    """Whether a path leads to a file outside of the directory; one of another machine leads nowhere."""
    leaves = os.path.isabs(path) or os.path.normpath(path).startswith("..")
    return leaves and (model_dir / path).exists()


def _unusable(
    model_dir: Path, found: str, remedy: str = "get the model where you trust it, or mend that file"
) -> ConfigError:
    rule = "a Hugging Face directory with a tokenizer that needs no code of its own and no file elsewhere"
    return ConfigError(explain(f"model.path={model_dir}", found=found, rule=rule, remedy=remedy))


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
