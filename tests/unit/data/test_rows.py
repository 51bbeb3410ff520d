from __future__ import annotations

import json
from typing import Any

import pytest

from nemo_spin.config.schema import DataConfig
from nemo_spin.data import rows
from nemo_spin.data.rows import (
    RefusedError,
    conversation_of,
    given_conversation,
    needed_columns,
    row_id,
    with_system_prompt,
)

USER = {"role": "user", "content": "Q"}
ANSWER = {"role": "assistant", "content": "A"}


def refusal(row: Any, **settings: Any) -> str:
    config = DataConfig(**settings)
    with pytest.raises(RefusedError) as caught:
        row_id(row, conversation_of(row, config), config)
    return caught.value.reason


def test_last_assistant_turn_is_the_response_and_what_follows_it_is_dropped() -> None:
    turns = [USER, ANSWER, {"role": "user", "content": "Q2"}, {"role": "assistant", "content": "A2"}]
    trailing = {"role": "user", "content": "never answered"}
    assert conversation_of({"messages": [*turns, trailing]}, DataConfig()) == turns


def test_first_round_only_keeps_system_prompt_and_answer_of_the_first_round() -> None:
    system = {"role": "system", "content": "S"}
    row = {"messages": [system, USER, ANSWER, USER, {"role": "assistant", "content": "later"}]}
    assert conversation_of(row, DataConfig(first_round_only=True)) == [system, USER, ANSWER]


def test_prompt_response_columns_are_configurable() -> None:
    config = DataConfig(format="prompt_response", prompt_column="q", response_column="a")
    assert conversation_of({"q": "Q", "a": "A"}, config) == [USER, ANSWER]
    assert needed_columns(config) == ["q", "a"]


def test_spin_rows_use_the_real_side_only() -> None:
    row = {"real": [USER, ANSWER], "generated": [USER, {"role": "assistant", "content": "machine"}]}
    assert conversation_of(row, DataConfig(format="spin")) == [USER, ANSWER]


def test_an_answer_that_came_with_a_row_belongs_to_its_prompt() -> None:
    machine = {"role": "assistant", "content": "machine"}
    for given in ([USER, machine], [machine], [{"role": "user", "content": " Q\n"}, machine]):
        assert given_conversation({"generated": given}, [USER, ANSWER]) == [USER, machine]
    other = [{"role": "user", "content": "Q of another row"}, machine]
    for given, reason in (
        (other, rows.OTHER_PROMPT),
        ([USER], rows.NO_RESPONSE),
        (None, rows.NOT_A_CONVERSATION),
    ):
        with pytest.raises(RefusedError) as caught:
            given_conversation({"generated": given}, [USER, ANSWER])
        assert caught.value.reason == reason


def test_text_may_come_as_bytes_and_as_parts() -> None:
    parts = [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]
    row = {"messages": [{"role": "user", "content": b"Q"}, {"role": "assistant", "content": parts}]}
    assert [message["content"] for message in conversation_of(row, DataConfig())] == ["Q", "AB"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["no", "mapping"], rows.NOT_AN_OBJECT),
        ({"text": "x"}, rows.MISSING_COLUMN),
        ({"messages": None}, rows.NOT_A_CONVERSATION),
        ({"messages": []}, rows.NOT_A_CONVERSATION),
        ({"messages": "user: hi"}, rows.NOT_A_CONVERSATION),
        ({"messages": [{"from": "human", "value": "hi"}]}, rows.NOT_A_CONVERSATION),
        ({"messages": [USER, {"role": "bot", "content": "A"}]}, rows.WRONG_ROLES),
        ({"messages": [USER, {"role": ["x"], "content": "A"}]}, rows.WRONG_ROLES),
        ({"messages": [USER]}, rows.NO_RESPONSE),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, rows.NO_RESPONSE),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, rows.NO_RESPONSE),
        ({"messages": [ANSWER]}, rows.WRONG_ROLES),
        ({"messages": [USER, ANSWER, ANSWER]}, rows.WRONG_ROLES),
        ({"messages": [USER, {"role": "system", "content": "S"}, USER, ANSWER]}, rows.WRONG_ROLES),
        ({"messages": [{"role": "user", "content": "  "}, ANSWER]}, rows.EMPTY_PROMPT),
        ({"messages": [{"role": "user", "content": 7}, ANSWER]}, rows.NOT_TEXT),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, rows.NOT_TEXT),
        ({"messages": [{"role": "user", "content": b"\xff"}, ANSWER]}, rows.NOT_UTF8),
        ({"messages": [{"role": "user", "content": json.loads('"\\ud800"')}, ANSWER]}, rows.NOT_UTF8),
    ],
)
def test_unusable_rows_are_refused_with_their_reason(row: Any, reason: str) -> None:
    assert refusal(row) == reason


@pytest.mark.parametrize("value", [None, "", 1.5, True, [1]])
def test_an_id_is_text_or_a_whole_number(value: Any) -> None:
    assert refusal({"messages": [USER, ANSWER], "key": value}, id_column="key") == rows.NO_ID


def test_ids_come_from_the_column_or_from_the_conversation_alone() -> None:
    row = {"messages": [USER, ANSWER], "key": 7, "other": "x"}
    messages = conversation_of(row, DataConfig())
    assert row_id(row, messages, DataConfig(id_column="key")) == "7"
    name = row_id(row, messages, DataConfig())
    assert name == row_id({**row, "other": "y"}, messages, DataConfig())
    assert name != row_id(row, [USER, {"role": "assistant", "content": "B"}], DataConfig())
    # Worked out outside: sha256 of [["user", "Q"], ["assistant", "A"]] as JSON, its first 24 digits.
    assert name == "0a266bac4424c674837ce8e4"


def test_system_prompt_is_added_only_where_there_is_none() -> None:
    own = {"role": "system", "content": "own"}
    assert with_system_prompt([USER], "S")[0] == {"role": "system", "content": "S"}
    assert with_system_prompt([own, USER], "S") == [own, USER]
    assert with_system_prompt([USER], None) == [USER]
