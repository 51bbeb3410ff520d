"""Functions named in the configuration: found, or explained."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nemo_spin.config.functions import function_file, load_function, names_a_function
from nemo_spin.errors import ConfigError

KEY = "spin.loss"


@pytest.mark.parametrize(
    ("name", "holds"),
    [
        ("a:b", True),
        ("a.b.c:d_1", True),
        ("some dir/a.py:b", True),
        ("C:/x.py:f", True),
        ("a.b", False),
        ("a:", False),
        (":b", False),
        ("a:1b", False),
        ("a:b.c", False),
        ("", False),
    ],
)
def test_the_form_of_a_name(name: str, holds: bool) -> None:
    assert names_a_function(name) is holds


def test_a_file_is_loaded_and_located(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("def double(x):\n    return 2 * x\n")
    monkeypatch.chdir(tmp_path)
    for name in ("mine.py:double", f"{tmp_path}/mine.py:double"):
        assert load_function(name, key=KEY)(4) == 8
        assert function_file(name, key=KEY) == tmp_path / "mine.py"


def test_a_changed_file_is_loaded_again(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    for number in (1, 22):  # of different length: bytecode caches go by size and whole seconds
        file.write_text(f"def f():\n    return {number}\n")
        assert load_function(f"{file}:f", key=KEY)() == number


def test_a_module_is_loaded_and_located_without_running_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_module_of_mine.py").write_text("def f():\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert function_file("a_module_of_mine:f", key=KEY) == tmp_path / "a_module_of_mine.py"
    assert "a_module_of_mine" not in sys.modules
    assert load_function("a_module_of_mine:f", key=KEY)() == 1
    del sys.modules["a_module_of_mine"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no_such_file.py:f", "there is no file "),
        ("no_such_module_at_all:f", "no_such_module_at_all"),
        ("no_such_package.inner:f", "no_such_package"),
        ("a.dotted.path", "is not a place and a function with a colon between them"),
    ],
)
def test_what_is_not_there_is_named(name: str, expected: str) -> None:
    for find in (load_function, function_file):
        with pytest.raises(ConfigError) as caught:
            find(name, key=KEY)
        assert str(caught.value).startswith(f"{KEY}={name}: ") and expected in str(caught.value)


@pytest.mark.parametrize("content", ["raise RuntimeError('no')", "def f(:", "import no_such_module_at_all"])
def test_a_file_that_raises_is_a_typed_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "mine.py").write_text(content)
    with pytest.raises(ConfigError, match=r"mine\.py raised (RuntimeError|SyntaxError|ModuleNotFoundError)"):
        load_function(f"{tmp_path}/mine.py:f", key=KEY)
