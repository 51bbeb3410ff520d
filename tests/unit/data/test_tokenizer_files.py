"""A stranger's tokenizer and chat template: nothing in them runs, asks, or leads elsewhere."""

from __future__ import annotations

import builtins
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from nemo_spin.config.schema import DataConfig
from nemo_spin.data.templates import load_template, load_tokenizer
from nemo_spin.errors import ConfigError
from tests.unit.data.tokenizers import TEMPLATES, save_tokenizer


class _Marks:
    """Pickled, it creates a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self._marker), "w")


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a stranger's code would create. Every question is answered with yes."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    return tmp_path / "ran"


@pytest.fixture
def directory(tmp_path: Path, marker: Path) -> Path:
    """A tokenizer with code and a pickle beside it."""
    made = save_tokenizer(tmp_path / "model")
    code = f"open({str(marker)!r}, 'w')\nclass Tokenizer: pass\nclass Config: pass\n"
    (made / "evil.py").write_text(code)
    (made / "pytorch_model.bin").write_bytes(pickle.dumps(_Marks(marker)))
    return made


def _edit(path: Path, **values: Any) -> None:
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **values}))


def _refused(directory: Path, *words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(directory)
    for word in (*words, str(directory), "remedy:"):
        assert word in str(caught.value)


def test_a_class_of_its_own_is_refused(directory: Path, marker: Path) -> None:
    auto_map = {"AutoTokenizer": [None, "evil.Tokenizer"]}
    _edit(directory / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Tokenizer")
    _refused(directory)
    assert not marker.exists()


def test_a_configuration_class_of_its_own_is_not_loaded(directory: Path, marker: Path) -> None:
    auto_map = {"AutoConfig": "evil.Config", "AutoTokenizer": [None, "evil.Tokenizer"]}
    _edit(directory / "config.json", model_type="evil", auto_map=auto_map)
    load_tokenizer(directory)  # it is read without that class
    assert not marker.exists()


@pytest.mark.parametrize("name", ["AutoModelForCausalLM", "AutoModel", "AutoTokenizer", "RagTokenizer"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_class_that_is_no_tokenizer_is_refused(directory: Path, marker: Path, name: str, file: str) -> None:
    auto_map = {"AutoConfig": "evil.Config", "AutoModel": "evil.Tokenizer"}
    _edit(directory / "config.json", model_type="evil", auto_map=auto_map)
    _edit(directory / file, tokenizer_class=name)
    _refused(directory, name, file)
    assert not marker.exists()


def test_a_tokenizer_made_of_tokenizers_asks_nothing_and_runs_nothing(directory: Path, marker: Path) -> None:
    parts = {"question_encoder": {"model_type": "evil"}, "generator": {"model_type": "evil"}}
    _edit(directory / "config.json", model_type="rag", **parts)
    (directory / "tokenizer_config.json").unlink()
    for part in ("question_encoder_tokenizer", "generator_tokenizer"):
        inner = save_tokenizer(directory / part)
        (inner / "evil.py").write_text((directory / "evil.py").read_text())
        _edit(inner / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
        auto_map = {"AutoTokenizer": [None, "evil.Tokenizer"]}
        _edit(inner / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Tokenizer")
    _refused(directory)
    assert not marker.exists()


@pytest.mark.parametrize(
    "detour",
    [
        {"fast_tokenizer_files": ["../other/tokenizer.4.0.json"]},
        {"tokenizer_file": "../other/tokenizer.4.0.json"},
        {"vocab_file": "../model/../other/tokenizer.4.0.json"},
    ],
    ids=lambda detour: next(iter(detour)),
)
def test_a_file_elsewhere_is_refused(tmp_path: Path, directory: Path, detour: dict[str, Any]) -> None:
    other = save_tokenizer(tmp_path / "other")
    (other / "tokenizer.json").rename(other / "tokenizer.4.0.json")
    _edit(directory / "tokenizer_config.json", **detour)
    _refused(directory, next(iter(detour)), "/other/tokenizer.4.0.json")
    _edit(directory / "tokenizer_config.json", **{key: str(other / "tokenizer.4.0.json") for key in detour})
    _refused(directory, next(iter(detour)), str(other))


def test_paths_of_another_machine_do_no_harm(directory: Path) -> None:
    places = {"special_tokens_map_file": str(directory), "tokenizer_file": "/not/here/tokenizer.json"}
    _edit(directory / "tokenizer_config.json", **places)
    assert load_tokenizer(directory).encode("cat")


ESCAPES = {
    "classes": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "attr": "{{ (messages|attr('__class__')).mro() }}",
    "attr in pieces": "{{ messages|attr('__cla' ~ 'ss__')|attr('mro')() }}",
    "item": "{{ messages['__class__']['__mro__'][1]['__subclasses__']() }}",
    "globals of a function": "{{ raise_exception.__globals__['__builtins__']['open'](MARKER, 'w') }}",
    "globals of a helper": "{{ cycler.__init__.__globals__.os.popen('touch ' ~ MARKER).read() }}",
    "globals of a namespace": "{{ namespace.__init__.__globals__.os.system('touch ' ~ MARKER) }}",
    "globals of a filter": "{{ lipsum.__globals__['os'].system('touch ' ~ MARKER) }}",
    "context": "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch ' ~ MARKER) }}",
    "code object": "{% macro m() %}{% endmacro %}{{ m.__call__.__func__.__code__.co_consts[0].x }}",
    "change": "{{ messages.append(messages[0]) }}",
    "include": "{% include MARKER %}",
    "import": "{% import '/etc/passwd' as x %}{{ x }}",
}


@pytest.mark.parametrize("escape", ESCAPES.values(), ids=ESCAPES)
def test_a_chat_template_cannot_leave_its_sandbox(tmp_path: Path, marker: Path, escape: str) -> None:
    text = escape.replace("MARKER", repr(str(marker))) + TEMPLATES["chatml"]
    with pytest.raises(ConfigError) as caught:
        load_template(DataConfig(), save_tokenizer(tmp_path / "model", template=text))
    assert "chat template" in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize(
    "how", ["'{0.__class__}'.format(messages)", "('{0.__class__}'|attr('format'))(messages)"]
)
def test_a_format_in_a_chat_template_shows_no_objects(tmp_path: Path, how: str) -> None:
    usual = load_template(DataConfig(), save_tokenizer(tmp_path / "usual"))
    odd = save_tokenizer(tmp_path / "odd", template="{{ " + how + " }}" + TEMPLATES["chatml"])
    assert load_template(DataConfig(), odd).prompt_ids("cat") == usual.prompt_ids("cat")
