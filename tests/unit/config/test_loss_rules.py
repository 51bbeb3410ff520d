"""Which objectives a configuration may name."""

from __future__ import annotations

import pytest

from nemo_spin.config.loss_rules import LOSS_NAMES
from nemo_spin.config.schema import Config, SpinConfig
from nemo_spin.config.validate import find_mistakes
from nemo_spin.objective.losses import LOSSES
from nemo_spin.objective.neighbours import NEIGHBOURS


def texts(**spin: object) -> list[str]:
    config = Config(spin=SpinConfig(**spin))  # type: ignore[arg-type]
    return [entry.text for entry in find_mistakes(config, command=None)]


def test_the_names_are_those_of_the_objectives() -> None:
    assert (*LOSSES, *NEIGHBOURS) == LOSS_NAMES


@pytest.mark.parametrize("loss", [*LOSS_NAMES, "losses.mine:squared", "my losses/a.py:squared_2"])
def test_names_and_functions_are_allowed(loss: str) -> None:
    assert texts(loss=loss) == []


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("hing", "did you mean `hinge`?"),
        ("DPO", "set spin.loss to one of these"),
        ("losses.mine.squared", "package.module:function"),
        ("a.py:", "package.module:function"),
        (":f", "package.module:function"),
        ("a.py:f(x)", "package.module:function"),
    ],
)
def test_other_names_are_refused(loss: str, expected: str) -> None:
    (text,) = texts(loss=loss)
    assert text.startswith(f"spin.loss: {loss!r}") and expected in text


def test_an_empty_name_is_refused() -> None:
    (text,) = texts(loss=" ")
    assert "must not be empty" in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("label_smoothing", 0.5),
        ("label_smoothing", -0.1),
        ("sft_weight", -1.0),
        ("dpop_weight", -1.0),
        ("opponent_mix", 1.1),
    ],
)
def test_options_have_ranges(key: str, value: float) -> None:
    (text,) = texts(**{key: value})
    assert text.startswith(f"spin.{key}: {value}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loss", "ipo"),
        ("loss", "mine.py:loss"),
        ("length_normalized", True),
        ("label_smoothing", 0.49),
        ("sft_weight", 0.1),
        ("dpop_weight", 50.0),
        ("opponent_mix", 1.0),
    ],
)
def test_options_are_allowed(key: str, value: object) -> None:
    assert texts(**{key: value}) == []
