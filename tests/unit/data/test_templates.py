from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_spin.config.schema import DataConfig
from nemo_spin.data import rows
from nemo_spin.data.rows import RefusedError
from nemo_spin.data.templates import Encoded, Template, load_template, load_tokenizer
from nemo_spin.errors import ConfigError
from tests.unit.data.tokenizers import TEMPLATES, byte_level, save_tokenizer, sentencepiece_like

PAPER = "### Instruction: {prompt}\n\n### Response: "
USER = {"role": "user", "content": "Add 12 and 30."}
ANSWER = {"role": "assistant", "content": "The sum is 42."}
TOKENIZERS = {"byte_level": lambda: byte_level(add_bos=True), "sentencepiece": sentencepiece_like}
TURN_ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "phi3": "<|end|>", "thinking": "<|im_end|>"}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        (kind, name): save_tokenizer(root / kind / name, template=name, tokenizer=TOKENIZERS[kind]())
        for kind in TOKENIZERS
        for name in TEMPLATES
    }


@pytest.fixture(scope="module")
def templates(directories: dict[tuple[str, str], Path]) -> dict[tuple[str, str], Template]:
    made = {key: load_template(DataConfig(), path) for key, path in directories.items()}
    for kind in TOKENIZERS:
        made[kind, "paper"] = load_template(DataConfig(prompt_template=PAPER), directories[kind, "chatml"])
    return made


def encode(template: Template, *messages: dict[str, str]) -> Encoded:
    encoded = template.encode([messages])[0]
    assert isinstance(encoded, Encoded), encoded
    return encoded


ALL = [(kind, name) for kind in TOKENIZERS for name in (*TEMPLATES, "paper")]


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_the_prompt_is_what_apply_chat_template_gives_and_the_response_follows(
    kind: str, name: str, templates: dict[Any, Template], directories: dict[Any, Path]
) -> None:
    if name == "paper":
        return
    tokenizer = load_tokenizer(directories[kind, name])
    encoded = encode(templates[kind, name], USER, ANSWER)
    prompt = tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    assert encoded.prompt_ids == prompt == templates[kind, name].prompt_ids("Add 12 and 30.")
    whole = tokenizer.apply_chat_template([USER, ANSWER], return_dict=False)
    joined = encoded.prompt_ids + encoded.real_ids
    if name == "thinking":  # the rendered conversation lacks what the generation prompt opens
        assert tokenizer.decode(joined).endswith("<think>\nThe sum is 42.<|im_end|>")
    elif name == "plain":  # the template has no end token: EOS in place of its newline
        assert joined[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(joined[:-1]) == "user: Add 12 and 30.\nassistant: The sum is 42."
    elif whole[: len(prompt)] != prompt:  # a token spans the border: the text is the same at least
        assert tokenizer.decode(whole).startswith(tokenizer.decode(joined))
    else:  # all but what the template puts behind the end token
        assert whole[: len(joined)] == joined
        assert tokenizer.decode(whole[len(joined) :]).strip() in ("", "</s>")


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_the_end_token_is_the_turns_end_and_eos_is_a_stop_too(
    kind: str, name: str, templates: dict[Any, Template], directories: dict[Any, Path]
) -> None:
    tokenizer = load_tokenizer(directories[kind, "chatml" if name == "paper" else name])
    template = templates[kind, name]
    end = tokenizer.convert_tokens_to_ids(TURN_ENDS.get(name, "</s>"))
    assert template.end_token_id == end
    assert template.stop_token_ids == tuple(sorted({end, tokenizer.eos_token_id}))
    assert encode(template, USER, ANSWER).real_ids[-1] == end


TEXT = st.text(
    st.one_of(
        st.sampled_from(" \n\t.,'<|>/_▁[]#"),
        st.characters(exclude_categories=["Cs"], exclude_characters="\x00"),
    ),
    min_size=1,
    max_size=40,
).filter(lambda text: text.strip() != "")


@pytest.mark.parametrize("name", [*TEMPLATES, "paper"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=TEXT, response=TEXT)
def test_round_trip_and_one_end_token_for_any_text(
    name: str, templates: dict[Any, Template], prompt: str, response: str
) -> None:
    template = templates["byte_level", name]
    encoded = encode(
        template, {"role": "user", "content": prompt}, {"role": "assistant", "content": response}
    )
    stops = set(template.stop_token_ids)
    assert [token in stops for token in encoded.real_ids] == [False] * (len(encoded.real_ids) - 1) + [True]
    assert encoded.prompt_ids.count(template.end_token_id) == encoded.prompt_text.count(template._end_text)
    shown = template.prompt_text(encoded.prompt_ids)
    assert shown.removeprefix("<s>") == encoded.prompt_text.removeprefix("<s>")
    assert template.response_text(encoded.real_ids) == encoded.real_text
    expected = {
        "zephyr": "\n" + response,
        "llama2": f" {response.strip()} ",
        "llama3": response.strip(),
        "plain": f" {response}".rstrip(),
        "thinking": response.lstrip(),
    }.get(name, response)
    assert encoded.real_text == expected


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(response=st.text("abc ABC.,\n12", min_size=1).filter(lambda text: text.strip() != ""))
def test_no_space_is_invented_between_prompt_and_response(
    templates: dict[Any, Template], response: str
) -> None:
    template = templates["sentencepiece", "paper"]
    encoded = encode(template, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": response})
    whole = template._tokenizer.decode(encoded.prompt_ids[1:] + encoded.real_ids[:-1])
    if not response.startswith(("\n", " ")):  # those may join the prompt's last token: then ids rule
        assert whole == PAPER.replace("{prompt}", "Hi") + response


def test_bos_comes_once_if_the_tokenizer_adds_it(tmp_path: Path) -> None:
    plain = save_tokenizer(tmp_path / "plain", tokenizer=byte_level())
    adding = save_tokenizer(tmp_path / "adding", tokenizer=byte_level(add_bos=True))
    for template_text in (PAPER, "<s>" + PAPER):
        with_bos = load_template(DataConfig(prompt_template=template_text), adding)
        assert with_bos.prompt_ids("Q").count(0) == 1
        assert with_bos.prompt_ids("Q")[0] == 0
    without = load_template(DataConfig(prompt_template=PAPER), plain)
    assert 0 not in without.prompt_ids("Q")
    assert 0 not in encode(with_bos, USER, ANSWER).real_ids


def test_several_rounds_keep_earlier_turns_in_the_prompt(templates: dict[Any, Template]) -> None:
    later = [{"role": "user", "content": "Again."}, {"role": "assistant", "content": "42!"}]
    encoded = encode(templates["byte_level", "chatml"], USER, ANSWER, *later)
    assert encoded.prompt_text.count("<|im_end|>") == 3
    assert encoded.real_text == "42!"
    refused = templates["byte_level", "paper"].encode([[USER, ANSWER, *later]])[0]
    assert isinstance(refused, RefusedError)
    assert refused.reason == rows.SEVERAL_ROUNDS


def test_a_refused_conversation_leaves_the_others_in_their_places(templates: dict[Any, Template]) -> None:
    system = {"role": "system", "content": "S"}
    results = templates["byte_level", "llama2"].encode(
        [[USER, ANSWER], [system, USER, ANSWER], [USER, ANSWER]]
    )
    assert isinstance(results[0], Encoded)
    assert results[0] == results[2]
    assert isinstance(results[1], RefusedError)
    assert str(results[1]) == f"{rows.TEMPLATE_REFUSED}: no system messages"


def test_end_tokens_in_the_data(templates: dict[Any, Template]) -> None:
    template = templates["byte_level", "chatml"]
    once = template.real_ids("The sum is 42.")
    assert template.real_ids("The sum is 42.<|im_end|>\n") == once
    assert template.real_ids("The sum is 42.</s><|im_end|>") == once
    for inside in ("a<|im_end|>b", "a</s>b"):
        with pytest.raises(RefusedError, match=rows.END_IN_RESPONSE):
            template.real_ids(inside)
    with pytest.raises(RefusedError, match=rows.NO_RESPONSE):
        template.real_ids("<|im_end|>")


def test_generation_configs_eos_ids_are_stop_ids(tmp_path: Path) -> None:
    directory = save_tokenizer(tmp_path, template="llama3", generation_eos=[1, 5])
    assert load_template(DataConfig(), directory).stop_token_ids == (1, 4, 5)
    (directory / "generation_config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        load_template(DataConfig(), directory)


def test_system_prompt_and_template_variables_reach_the_template(tmp_path: Path) -> None:
    text = "{{ mood }}|" + TEMPLATES["chatml"]
    directory = save_tokenizer(tmp_path, template=text)
    config = DataConfig(system_prompt="Be brief.", chat_template_kwargs={"mood": "calm"})
    prompt = encode(load_template(config, directory), USER, ANSWER).prompt_text
    assert prompt.startswith("calm|<|im_start|>system\nBe brief.<|im_end|>")
    paper = load_template(DataConfig(system_prompt="Be brief.", prompt_template=PAPER), directory)
    assert encode(paper, USER, ANSWER).prompt_text.startswith("### Instruction: Be brief.\n\nAdd 12")


def test_todays_date_never_gets_into_the_ids(tmp_path: Path) -> None:
    text = "{% if strftime_now is defined %}{% set date = strftime_now('%d %b %Y') %}{{ date }}|{% endif %}"
    text += TEMPLATES["chatml"]
    directory = save_tokenizer(tmp_path, template=text)
    template = load_template(DataConfig(), directory)
    assert encode(template, USER, ANSWER).prompt_text.startswith("26 Jul 2024|<|im_start|>user")


def test_cutting_from_the_left_keeps_bos(templates: dict[Any, Template]) -> None:
    template = templates["byte_level", "paper"]
    ids = template.prompt_ids("Add 12 and 30.")
    assert template.cut_left(ids, 5) == [0, *ids[-4:]]
    assert template.cut_left(ids[1:], 5) == ids[-5:]


@pytest.mark.parametrize(
    ("settings", "tokenizer", "said"),
    [
        ({}, {"template": None}, "no chat template"),
        ({}, {"template": "{{ raise_exception('never') }}"}, "never"),
        ({}, {"template": "{{ messages[0].nothing.at_all }}"}, "cannot be used"),
        (
            {},
            {"template": "{% for m in messages %}{{ m['role'] }}{% endfor %}"},
            "one question and its answer",
        ),
        ({}, {"template": "{% if %}"}, "cannot be used"),
        ({}, {"template": "plain", "eos": None}, "no eos_token"),
        ({"prompt_template": PAPER}, {"eos": None}, "no eos_token"),
        ({"prompt_template": "Q: prompt A:"}, {}, "0 times {prompt}"),
    ],
)
def test_what_cannot_be_used_is_said_with_its_remedy(
    tmp_path: Path, settings: dict[str, Any], tokenizer: dict[str, Any], said: str
) -> None:
    directory = save_tokenizer(tmp_path, **tokenizer)
    with pytest.raises(ConfigError) as caught:
        load_template(DataConfig(**settings), directory)
    assert said in str(caught.value)
    assert "remedy:" in str(caught.value)


def test_missing_and_broken_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path"):
        load_tokenizer(tmp_path / "nowhere")
    directory = save_tokenizer(tmp_path / "broken")
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"model\.path"):
        load_tokenizer(directory)
