from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nemo_spin.errors import ConfigError
from nemo_spin.evaluate.scorer import checked_score, load_scorer, scorer_sha256

CODE = """
from dataclasses import dataclass

@dataclass
class Weight:
    value: float = 2.0

def double(prompt, real, response):
    return Weight().value * (real == response)

nothing = 3
"""


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own scorers").mkdir()
    (tmp_path / "own scorers" / "mine.py").write_text(CODE)
    return tmp_path


def test_a_file_relative_to_the_working_directory() -> None:
    scorer = load_scorer("own scorers/mine.py:double")
    assert (scorer("p", "a", "a"), scorer("p", "a", "b")) == (2.0, 0.0)


def test_a_module_by_its_dotted_name(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / "package").mkdir()
    (directory / "package" / "__init__.py").touch()
    (directory / "package" / "rewards.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(directory))
    assert load_scorer("package.rewards:double")("p", "a", "a") == 2.0
    assert scorer_sha256("package.rewards:double") == scorer_sha256("own scorers/mine.py:double")
    del sys.modules["package.rewards"]


def test_the_quickstarts_scorer() -> None:
    path = Path(__file__).parents[3] / "examples" / "quickstart" / "exact_match.py"
    score = load_scorer(f"{path}:score")
    assert score("p", "a b", " a b\n") == 1.0
    assert score("p", "a b", "a  b") == 0.0


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("mine.py:double", "no file"),
        ("own scorers/mine.py:single", "no function single"),
        ("own scorers/mine.py:nothing", "no function nothing"),
        ("own scorers/mine.py", "colon"),
        ("own scorers/mine.py:", "colon"),
        (":double", "colon"),
        ("no.such.module:double", "cannot be imported"),
        ("broken.py:double", "SyntaxError"),
        ("raises.py:double", "ZeroDivisionError"),
    ],
)
def test_what_cannot_be_loaded_is_refused(directory: Path, name: str, found: str) -> None:
    (directory / "broken.py").write_text("def double(:\n")
    (directory / "raises.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match=found) as caught:
        load_scorer(name)
    assert str(caught.value).startswith(f"evaluation.scorer={name}")


def test_the_hash_is_that_of_the_file_and_the_function(directory: Path) -> None:
    before = scorer_sha256("own scorers/mine.py:double")
    assert before != scorer_sha256("own scorers/mine.py:nothing")
    (directory / "own scorers" / "mine.py").write_text(CODE + "\n")
    assert before != scorer_sha256("own scorers/mine.py:double")
    assert scorer_sha256(None) is None
    for name in ("nowhere.py:double", "no.such.module:double", "nosuch:double"):
        with pytest.raises(ConfigError):
            scorer_sha256(name)


def test_a_function_of_other_arguments_is_refused_before_it_is_needed(directory: Path) -> None:
    (directory / "two.py").write_text("def double(real, response):\n    return 1.0\n")
    with pytest.raises(ConfigError, match=r"cannot be called with \(prompt, real, response\): too many"):
        load_scorer("two.py:double")


def test_what_raises_is_named_with_the_answer_it_raised_at() -> None:
    def score(prompt: str, real: str, response: str) -> float:
        return {"a": 1.0}[response]

    with pytest.raises(ConfigError, match="its function raised KeyError: 'b' for the response 'b'"):
        checked_score(score, prompt="p", real="a", response="b")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "much", None, [1]])
def test_a_score_is_a_finite_number(value: object) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.scorer"):
        checked_score(lambda _prompt, _real, _response: value, prompt="p", real="a", response="b")  # type: ignore[arg-type,return-value]


def test_true_counts_as_one() -> None:
    assert (
        checked_score(lambda _p, real, response: real == response, prompt="", real="a", response="a") == 1.0
    )
