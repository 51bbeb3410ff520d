"""From a row of a data set, in any of the supported formats, to one conversation.

A conversation is what the templates take: an optional system message, the rounds before
the response, and the response as its last message. A row from which none can be made is
refused with a reason; the reasons are counted, so each begins with one of the constants
below and adds what is particular to the row after a colon.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_spin.config.schema import DataConfig

Message = dict[str, str]

FORMATS = ("messages", "prompt_response", "spin")
ROLES = ("system", "user", "assistant")

NOT_UTF8 = "not UTF-8"
NOT_JSON = "not JSON"
NOT_AN_OBJECT = "not an object with columns"
MISSING_COLUMN = "missing column"
NOT_A_CONVERSATION = "not a list of messages"
WRONG_ROLES = "wrong roles"
NOT_TEXT = "content is not text"
EMPTY_PROMPT = "empty prompt"
NO_RESPONSE = "no response"
OTHER_PROMPT = "generated answers another prompt"
NO_ID = "no id"
SEVERAL_ROUNDS = "several rounds in one prompt_template"
TEMPLATE_REFUSED = "refused by the chat template"
END_IN_RESPONSE = "end token inside the response"
OVERLONG_PROMPT = "prompt too long"
OVERLONG_RESPONSE = "response too long"


class RefusedError(Exception):
    """A row cannot be used.

    Args:
        reason: One of this module's constants.
        detail: What is particular to the row.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def needed_columns(config: DataConfig) -> list[str]:
    """The columns that every source must have under `config`."""
    by_format = {
        "messages": [config.messages_column],
        "prompt_response": [config.prompt_column, config.response_column],
        "spin": ["real"],
    }
    if config.use_generations:
        by_format["spin"].append("generated")
    return by_format[config.format] + ([config.id_column] if config.id_column else [])


def conversation_of(row: Any, config: DataConfig) -> list[Message]:
    """The conversation of `row`; its last message is the assistant's response.

    Args:
        row: Column name -> value.
        config: Format, column names and `first_round_only`.

    Raises:
        RefusedError: None can be made of it.
    """
    if not isinstance(row, Mapping):
        raise RefusedError(NOT_AN_OBJECT, type(row).__name__)
    if config.format == "prompt_response":
        messages = [
            {"role": "user", "content": _text(_column(row, config.prompt_column))},
            {"role": "assistant", "content": _text(_column(row, config.response_column))},
        ]
    else:
        column = "real" if config.format == "spin" else config.messages_column
        messages = _messages(_column(row, column))
    return _with_response(messages, first_round_only=config.first_round_only)


def given_conversation(row: Mapping[str, Any], messages: Sequence[Message]) -> list[Message]:
    """The conversation with the answer that came with it (the column `generated`) in the response's place.

    Args:
        row: A row of which `messages` are the conversation.
        messages: Its conversation, as `conversation_of` gives it.

    Raises:
        RefusedError: There is no such answer, or it follows another prompt.
    """
    given = _messages(_column(row, "generated"))
    if given[-1]["role"] != "assistant":
        raise RefusedError(NO_RESPONSE, "generated does not end with the assistant's answer")
    prompts = [turn["content"].strip() for turn in given[-2:-1]]
    if prompts and prompts != [messages[-2]["content"].strip()]:
        raise RefusedError(OTHER_PROMPT, prompts[0][:40])
    return [*messages[:-1], given[-1]]


def with_system_prompt(messages: list[Message], system_prompt: str | None) -> list[Message]:
    """`messages`, begun by `system_prompt` where they have no system message of their own."""
    if not system_prompt or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def row_id(row: Any, messages: Sequence[Message], config: DataConfig) -> str:
    """The row's own id, or a hash of its conversation: the same text has the same id.

    Raises:
        RefusedError: `data.id_column` holds neither text nor a whole number.
    """
    if config.id_column is None:
        return content_hash([[message["role"], message["content"]] for message in messages])
    value = _column(row, config.id_column)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise RefusedError(NO_ID, f"{config.id_column} is {value!r}")
    return _checked(str(value))


def content_hash(value: Any) -> str:
    """Names any value that JSON can hold (bytes too) by 24 hexadecimal digits."""
    data = value if isinstance(value, bytes) else json.dumps(value, default=repr, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:24]


def _column(row: Mapping[str, Any], name: str) -> Any:
    try:
        return row[name]
    except KeyError:
        raise RefusedError(MISSING_COLUMN, name) from None


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise RefusedError(NOT_A_CONVERSATION)
    messages = []
    for message in value:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise RefusedError(NOT_A_CONVERSATION, "a message has a role and a content")
        role = message["role"]
        if role not in ROLES:
            raise RefusedError(WRONG_ROLES, f"{role!r:.40} is not one of {', '.join(ROLES)}")
        messages.append({"role": role, "content": _text(message["content"])})
    return messages


def _with_response(messages: list[Message], *, first_round_only: bool) -> list[Message]:
    """Cuts `messages` behind the response and checks what is left."""
    positions = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not positions:
        raise RefusedError(NO_RESPONSE)
    messages = messages[: (positions[0] if first_round_only else positions[-1]) + 1]
    if not messages[-1]["content"].strip():
        raise RefusedError(NO_RESPONSE)
    if any(message["role"] == "system" for message in messages[1:]):
        raise RefusedError(WRONG_ROLES, "a system message after the first message")
    if len(messages) < 2 or messages[-2]["role"] != "user":
        raise RefusedError(WRONG_ROLES, "no user message before the response")
    if not messages[-2]["content"].strip():
        raise RefusedError(EMPTY_PROMPT)
    return messages


def _text(value: Any) -> str:
    """Text given as such, as bytes, or as a list of text parts."""
    if value is None:
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise RefusedError(NOT_UTF8) from None
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in value]
        if not all(isinstance(part, str) for part in parts):
            raise RefusedError(NOT_TEXT, "a part is not text")
        value = "".join(part for part in parts if part is not None)
    if not isinstance(value, str):
        raise RefusedError(NOT_TEXT, type(value).__name__)
    return _checked(value)


def _checked(text: str) -> str:
    """Refuses half surrogate pairs: JSON can spell them, UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RefusedError(NOT_UTF8, "half a surrogate pair") from None
    return text
