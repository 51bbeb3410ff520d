"""What a worker does with one piece of a data set: parse, template, tokenize, cut.

Depends on the piece and the configuration alone, so the result is the same whichever
process does it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from nemo_spin.config.schema import DataConfig
from nemo_spin.data.columns import PREPARED, PREPARED_GIVEN
from nemo_spin.data.overlap import prompt_hashes
from nemo_spin.data.rows import (
    NOT_JSON,
    NOT_UTF8,
    OVERLONG_PROMPT,
    OVERLONG_RESPONSE,
    Message,
    RefusedError,
    content_hash,
    conversation_of,
    given_conversation,
    row_id,
)
from nemo_spin.data.sources import Piece
from nemo_spin.data.templates import Encoded, Template


@dataclass(frozen=True)
class Refusal:
    """A row that goes to quarantine; `reason` without what is particular to the row."""

    id: str
    row: int
    reason: str
    text: str


@dataclass
class EncodedPiece:
    """The rows of one piece.

    Attributes:
        batch: Accepted rows (columns.PREPARED) in input order; ids may still repeat.
        refusals: The others.
        num_cut_prompts: Accepted rows whose prompt was shortened.
        num_cut_responses: Accepted rows whose response was cut, and so has no end token.
        prompt_hashes: Of the accepted rows (`overlap.prompt_hashes`); empty without held-out data.
    """

    batch: pa.RecordBatch
    refusals: list[Refusal] = field(default_factory=list)
    num_cut_prompts: int = 0
    num_cut_responses: int = 0
    prompt_hashes: bytes = b""

    @property
    def num_rows(self) -> int:
        """All rows, accepted or refused."""
        accepted: int = self.batch.num_rows
        return accepted + len(self.refusals)


def encode_piece(piece: Piece, template: Template, config: DataConfig) -> EncodedPiece:
    """Turns the rows of `piece` into token ids or refusals."""
    refused: list[Refusal] = []
    numbers: list[int] = []
    ids: list[str] = []
    conversations: list[list[Message]] = []
    given: list[list[Message]] = []
    for number, row in rows_of(piece):
        name = None
        try:
            if isinstance(row, RefusedError):
                raise row
            messages = conversation_of(row, config)
            name = row_id(row, messages, config)
            answer = given_conversation(row, messages) if config.use_generations else messages
        except RefusedError as refusal:
            refused.append(Refusal(_quarantine_id(row, number), number, refusal.reason, str(refusal)))
            continue
        numbers.append(number)
        ids.append(name)
        conversations.append(messages)
        given.append(answer)
    schema = schema_of(config)
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    result = EncodedPiece(pa.RecordBatch.from_pylist([], schema), refused)
    answers = _given_ids(given, template, config) if config.use_generations else [[]] * len(given)
    for number, name, encoded, answer_ids in zip(
        numbers, ids, template.encode(conversations), answers, strict=True
    ):
        try:
            fitted = _fit(encoded, template, config)
        except RefusedError as refusal:
            refused.append(Refusal(name, number, refusal.reason, str(refusal)))
            continue
        assert isinstance(encoded, Encoded), "a refusal was raised"
        result.num_cut_prompts += len(fitted.prompt_ids) < len(encoded.prompt_ids)
        result.num_cut_responses += len(fitted.real_ids) < len(encoded.real_ids)
        values = (name, fitted.prompt_ids, fitted.real_ids, fitted.prompt_text, fitted.real_text, answer_ids)
        for column, value in zip(schema.names, values, strict=False):  # answers are the last column, if any
            columns[column].append(value)
    refused.sort(key=lambda refusal: refusal.row)
    result.batch = pa.RecordBatch.from_pydict(columns, schema)
    if config.heldout is not None:
        result.prompt_hashes = prompt_hashes(columns["prompt_text"])
    return result


def schema_of(config: DataConfig) -> pa.Schema:
    """The columns of prepared rows."""
    return PREPARED_GIVEN if config.use_generations else PREPARED


def _given_ids(given: list[list[Message]], template: Template, config: DataConfig) -> list[list[int]]:
    """The answers that came with the rows, cut like responses; an empty one is the end token alone."""
    limit = config.max_response_length
    return [
        encoded.real_ids[:limit] if isinstance(encoded, Encoded) else [template.end_token_id]
        for encoded in template.encode(given)
    ]


def _fit(encoded: Encoded | RefusedError, template: Template, config: DataConfig) -> Encoded:
    """Applies the length limits; the texts always say what the ids say."""
    if isinstance(encoded, RefusedError):
        raise encoded
    prompt_ids, real_ids = encoded.prompt_ids, encoded.real_ids
    prompt_text, real_text = encoded.prompt_text, encoded.real_text
    if len(prompt_ids) > config.max_prompt_length:
        if config.overlong_prompt == "quarantine":
            raise RefusedError(OVERLONG_PROMPT, f"{len(prompt_ids)} of {config.max_prompt_length} tokens")
        prompt_ids = template.cut_left(prompt_ids, config.max_prompt_length)
        prompt_text = template.prompt_text(prompt_ids)
    if len(real_ids) > config.max_response_length:
        if config.overlong_response == "quarantine":
            raise RefusedError(OVERLONG_RESPONSE, f"{len(real_ids)} of {config.max_response_length} tokens")
        real_ids = real_ids[: config.max_response_length]
        real_text = template.response_text(real_ids)
    return Encoded(prompt_ids, real_ids, prompt_text, real_text)


def rows_of(piece: Piece) -> Iterator[tuple[int, Any]]:
    """Row number and row: a mapping, something else that was found, or why it cannot be read."""
    if piece.records is not None:
        for number, record in zip(piece.numbers, piece.records, strict=True):
            yield number, _parse(record)
        return
    table = pa.ipc.open_stream(piece.batch).read_all().slice(0, len(piece))
    try:
        yield from zip(piece.numbers, table.to_pylist(), strict=True)
    except UnicodeDecodeError:
        for place, number in enumerate(piece.numbers):
            try:
                yield number, table.slice(place, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield number, RefusedError(NOT_UTF8)


def _parse(record: bytes) -> Any:
    try:
        return json.loads(record.decode("utf-8"))
    except UnicodeDecodeError:
        return RefusedError(NOT_UTF8)
    except (ValueError, RecursionError) as error:
        return RefusedError(NOT_JSON, str(error)[:100])


def _quarantine_id(row: Any, number: int) -> str:
    """Names a row that has no conversation; rows that cannot be read only by their number."""
    return f"row-{number}" if isinstance(row, RefusedError) else content_hash(row)
