from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from nemo_spin.config.schema import DataConfig
from nemo_spin.data import rows
from nemo_spin.data.columns import PREPARED
from nemo_spin.data.encode import EncodedPiece, encode_piece
from nemo_spin.data.sources import Piece, pack
from nemo_spin.data.templates import Template, load_template
from tests.unit.data.tokenizers import conversation, save_tokenizer


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    return load_template(DataConfig(), save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def encoded(template: Template, records: list[Any], **settings: Any) -> EncodedPiece:
    texts = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    return encode_piece(Piece(range(10, 10 + len(texts)), records=texts), template, DataConfig(**settings))


def test_rows_and_refusals_keep_their_order_and_numbers(template: Template) -> None:
    good = conversation("Add 1 and 2.", "The sum is 3.")
    piece = encoded(
        template, [b"{", good, b'{"messages": "\xff"}', {"messages": []}, conversation("a", "b</s>c"), good]
    )
    assert piece.batch.schema == PREPARED
    assert piece.batch.num_rows == 2
    assert [(refusal.row, refusal.reason) for refusal in piece.refusals] == [
        (10, rows.NOT_JSON),
        (12, rows.NOT_UTF8),
        (13, rows.NOT_A_CONVERSATION),
        (14, rows.END_IN_RESPONSE),
    ]
    assert piece.num_rows == 6
    row = piece.batch.to_pylist()[0]
    assert row["real_text"] == "The sum is 3."
    assert row["prompt_ids"] == template.prompt_ids("Add 1 and 2.")
    assert row["real_ids"] == template.real_ids("The sum is 3.")


def test_a_response_cut_by_its_limit_has_no_end_token(template: Template) -> None:
    whole = template.real_ids("The sum is 3.")
    row = conversation("Add 1 and 2.", "The sum is 3.")
    fits = encoded(template, [row], max_response_length=len(whole))
    assert fits.batch["real_ids"].to_pylist() == [whole]
    assert fits.num_cut_responses == 0
    cut = encoded(template, [row], max_response_length=len(whole) - 1)
    assert cut.batch["real_ids"].to_pylist() == [whole[:-1]]
    assert cut.num_cut_responses == 1
    short = encoded(template, [row], max_response_length=4)
    assert template.end_token_id not in short.batch["real_ids"].to_pylist()[0]
    assert "The sum is 3.".startswith(short.batch["real_text"].to_pylist()[0])
    refused = encoded(template, [row], max_response_length=4, overlong_response="quarantine")
    assert [refusal.reason for refusal in refused.refusals] == [rows.OVERLONG_RESPONSE]


def test_long_prompts_are_refused_or_cut_on_the_left(template: Template) -> None:
    row = conversation("Add 1 and 2.", "The sum is 3.")
    whole = template.prompt_ids("Add 1 and 2.")
    assert encoded(template, [row], max_prompt_length=len(whole)).batch.num_rows == 1
    refused = encoded(template, [row], max_prompt_length=len(whole) - 1)
    assert refused.refusals[0].text == f"{rows.OVERLONG_PROMPT}: {len(whole)} of {len(whole) - 1} tokens"
    cut = encoded(template, [row], max_prompt_length=5, overlong_prompt="truncate_left")
    assert cut.batch["prompt_ids"].to_pylist() == [whole[-5:]]
    assert cut.batch["prompt_text"].to_pylist() == [template.prompt_text(whole[-5:])]
    assert cut.num_cut_prompts == 1


def test_one_bad_string_of_a_parquet_file_costs_one_row(template: Template) -> None:
    texts = pa.Array.from_buffers(
        pa.string(),
        3,
        [None, pa.array([0, 1, 3, 4], pa.int32()).buffers()[1], pa.py_buffer(b"Q\xff\xfeQ")],
    )
    table = pa.table({"prompt": texts, "response": ["A", "B", "C"]})
    piece = encode_piece(pack(table, 0), template, DataConfig(format="prompt_response"))
    assert piece.batch["real_text"].to_pylist() == ["A", "C"]
    assert [(refusal.id, refusal.row, refusal.reason) for refusal in piece.refusals] == [
        ("row-1", 1, rows.NOT_UTF8)
    ]


def test_a_piece_of_refusals_only(template: Template) -> None:
    piece = encoded(template, [b"{", b"["])
    assert piece.batch.num_rows == 0
    assert piece.batch.schema == PREPARED
    assert piece.num_rows == 2


def test_ids_of_refused_rows_are_the_rows_own(template: Template) -> None:
    piece = encoded(template, [{**conversation("a", "b</s>c"), "key": "k7"}], id_column="key")
    assert piece.refusals[0].id == "k7"
