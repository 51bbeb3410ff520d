from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_spin.data.token_ids import token_ids_of
from nemo_spin.data.tokenizer_files import load_tokenizer
from tests.unit.data.tokenizers import SPECIAL, byte_level, save_tokenizer, sentencepiece_like

KINDS = {"byte_level": lambda: byte_level(add_bos=True), "sentencepiece": sentencepiece_like}
TEXT = st.lists(st.one_of(st.sampled_from([*SPECIAL, " ", "\n", "▁"]), st.text(max_size=8)), max_size=6)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    paths = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    return {
        kind: load_tokenizer(save_tokenizer(path, tokenizer=KINDS[kind]())) for kind, path in paths.items()
    }


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(texts=st.lists(TEXT.map("".join), min_size=1, max_size=4))
def test_ids_are_those_of_transformers(kind: str, tokenizers: dict[str, Any], texts: list[str]) -> None:
    expected = tokenizers[kind](texts, add_special_tokens=False)["input_ids"]
    assert token_ids_of(tokenizers[kind])(texts) == expected


def test_nothing_is_cut_or_padded_whatever_the_files_say(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=40)
    ids = token_ids_of(load_tokenizer(save_tokenizer(tmp_path, tokenizer=backend)))
    plain = byte_level()
    texts = ["a rather long text", "b"]
    assert ids(texts) == [plain.encode(text).ids for text in texts]
    assert ids([]) == []


class Upper:
    """A tokenizer that does something to a text before its library sees it."""

    def __init__(self, tokenizer: Any, *, with_library: bool) -> None:
        self._tokenizer = tokenizer
        if with_library:
            self.backend_tokenizer = tokenizer.backend_tokenizer

    def __call__(self, texts: list[str], **settings: Any) -> Any:
        return self._tokenizer([text.upper() for text in texts], **settings)


@pytest.mark.parametrize("with_library", [True, False])
def test_one_that_does_more_than_its_library_is_asked_itself(
    tokenizers: dict[str, Any], *, with_library: bool
) -> None:
    tokenizer = tokenizers["byte_level"]
    ids = token_ids_of(Upper(tokenizer, with_library=with_library))
    assert ids(["abc"]) == tokenizer(["ABC"], add_special_tokens=False)["input_ids"]
