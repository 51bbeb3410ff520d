from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from nemo_spin.config.schema import DataConfig
from nemo_spin.data.prompt_ends import PromptEnds
from nemo_spin.data.templates import Template, load_template, load_tokenizer
from tests.unit.data.tokenizers import SPECIAL, TEMPLATES, byte_level, save_tokenizer, sentencepiece_like

TOKENIZERS = {"byte_level": lambda: byte_level(add_bos=True), "sentencepiece": sentencepiece_like}
# None of llama2's: the last token of its prompts stands before the question. Plain has none at all.
SPLIT = ["chatml", "zephyr", "llama3", "phi3", "thinking"]
TEXT = st.lists(
    st.one_of(st.sampled_from([*SPECIAL, " ", "\n", "▁", "<|im_", "start|>"]), st.text(max_size=8)),
    min_size=1,
    max_size=6,
).map("".join)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Template, Template]]:
    """Templates that take prompts from their conversations, and the same that tokenize them."""
    made = {}
    for kind, tokenizer in TOKENIZERS.items():
        for name in TEMPLATES:
            path = save_tokenizer(tmp_path_factory.mktemp(kind) / name, template=name, tokenizer=tokenizer())
            taking, tokenizing = (load_template(DataConfig(), path) for _ in range(2))
            tokenizing._ends = None
            made[kind, name] = taking, tokenizing
    return made


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(texts=st.tuples(TEXT, TEXT, TEXT, TEXT))
def test_ids_are_those_of_prompts_tokenized_alone(
    kind: str, pairs: dict[tuple[str, str], tuple[Template, Template]], texts: tuple[str, ...]
) -> None:
    """Also where users write special tokens, and over several rounds."""
    rounds = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
    for (of, name), (taking, tokenizing) in pairs.items():
        if of == kind:
            found, expected = (template.encode([rounds, rounds[:2]]) for template in (taking, tokenizing))
            assert [str(item) for item in found] == [str(item) for item in expected], name


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_tokenized_only_where_their_ends_cannot_be_known(
    kind: str,
    name: str,
    pairs: dict[tuple[str, str], tuple[Template, Template]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    template = pairs[kind, name][0]
    asked: list[str] = []
    tokenize = template._tokenize
    monkeypatch.setattr(template, "_tokenize", lambda texts: [asked.extend(texts), tokenize(texts)][1])
    template.encode(
        [[{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine. Fine."}]]
    )
    assert sum("Fine. Fine." not in text for text in asked) == (name not in SPLIT)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized"])
def test_tokens_that_change_with_what_is_beside_them_are_no_ends(flag: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_tokenizer(tmp_path))
    prompt = "a<|end|>b"
    ids = tokenizer(prompt + "c", add_special_tokens=False)["input_ids"]
    assert PromptEnds(tokenizer, prompt).ids(prompt, prompt + "c", ids) is not None
    tokenizer.add_tokens(AddedToken("<|end|>", **{"special": True, "normalized": False, flag: True}))
    assert getattr(tokenizer.added_tokens_decoder[SPECIAL.index("<|end|>")], flag)
    assert PromptEnds(tokenizer, prompt).ids(prompt, prompt + "c", ids) is None


def test_a_token_within_a_longer_one_is_no_end(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_tokenizer(tmp_path))
    tokenizer.add_special_tokens({"additional_special_tokens": ["x<|end|>"]})
    ends = PromptEnds(tokenizer, "a<|end|>")
    assert ends.ids("a<|end|>", "a<|end|>b", [0, SPECIAL.index("<|end|>"), 0]) is None
