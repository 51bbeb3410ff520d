"""A user's own loss: the example, both signatures, and everything that cannot be one."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from nemo_spin.errors import ConfigError
from nemo_spin.objective.losses import PairLogps
from nemo_spin.objective.objective import build_objective
from nemo_spin.objective.user_loss import load_user_loss
from tests.unit.objective.pairs import gradients, pair
from tests.unit.objective.test_objective import LENGTHS

EXAMPLE = Path(__file__).parents[3] / "examples" / "losses" / "own_loss.py"


def test_the_example_of_the_margin() -> None:
    # gains 2 and -1, beta 0.2: t = 0.6; (1 - 0.6)^2, slope -2 * 0.4 * 0.2
    logps = pair(-10.0, -7.0, -12.0, -6.0)
    loss = build_objective(loss=f"{EXAMPLE}:squared_hinge", beta=0.2)(logps, LENGTHS)
    assert loss.item() == pytest.approx(0.16, abs=1e-12)
    assert gradients(loss, logps) == pytest.approx((-0.16, 0.16), abs=1e-12)


def test_the_example_of_the_pair() -> None:
    # real gain 2, beta 0.5 ln 3: r = ln 3, log(1 + 1/3), slope -beta / 4
    logps, beta = pair(-10.0, -7.0, -12.0, -6.0), 0.5 * math.log(3.0)
    loss = build_objective(loss=f"{EXAMPLE}:real_only", beta=beta)(logps, LENGTHS)
    assert loss.item() == pytest.approx(math.log(4 / 3), abs=1e-12)
    assert gradients(loss, logps) == pytest.approx((-beta / 4, 0.0), abs=1e-12)


def test_a_relative_path_and_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLE.parent)
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    logps = pair(-10.0, -7.0, -12.0, -6.0)
    for name in ("own_loss.py:squared_hinge", "own_loss:squared_hinge"):
        assert load_user_loss(name)(logps, 0.2).item() == pytest.approx(0.16, abs=1e-12)


def test_it_combines_with_the_options() -> None:
    # t = 0.6 and, swapped, -0.6: 0.9 * 0.16 + 0.1 * 2.56, and 10 nats over 4 tokens
    logps = pair(-10.0, -7.0, -12.0, -6.0)
    objective = build_objective(
        loss=f"{EXAMPLE}:squared_hinge", beta=0.2, label_smoothing=0.1, sft_weight=0.5
    )
    assert objective(logps, LENGTHS).item() == pytest.approx(0.144 + 0.256 + 1.25, abs=1e-12)


SOURCE = """
import torch
NUMBER = 3.0
def none(): return 0
def three(a, b, c): return a
def upwards(margin): return margin.exp()
def flat(margin): return margin.square()
def mean(margin): return (-margin).exp().mean()
def detached(margin): return (-margin).exp().detach()
def number(margin): return 1.0
def infinite(margin): return -(margin + 2.0).log()
def mixed(margin): return (-margin).exp().mean().expand(len(margin))
def small(margin):
    if len(margin) > 3: raise ValueError("too many")
    return (-margin).exp() if len(margin) == 3 else (-margin).exp().sum()
def broken(margin): return margin.no_such_thing()
def keyword(margin, scale=2.0, **others): return (-scale * margin).exp()
"""


@pytest.fixture
def losses(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(SOURCE)
    return file


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("missing", "there is no function missing"),
        ("NUMBER", "there is no function NUMBER"),
        ("none", "takes (); a loss takes (margin), or (logps, beta)"),
        ("three", "takes (a, b, c); a loss takes (margin), or (logps, beta)"),
        ("upwards", "has slope 2 where every iteration begins"),
        ("flat", "has slope 0 where every iteration begins"),
        ("mean", "returned [] for 3 pairs, not one value each"),
        ("detached", "returned a tensor without gradient"),
        ("number", "returned float for 3 pairs"),
        ("infinite", "inf] at margins 0, 2, -2"),
        ("mixed", "mixes pairs: the value of one depends on another's margin"),
        ("broken", "raised AttributeError: 'Tensor' object has no attribute 'no_such_thing'"),
    ],
)
def test_what_is_not_a_loss_is_refused_before_it_trains(losses: Path, function: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_objective(loss=f"{losses}:{function}", beta=0.1)
    message = str(caught.value)
    assert message.startswith(f"spin.loss={losses}:{function}: ") and expected in message
    assert "  rule:   " in message and "  remedy: " in message


@pytest.mark.parametrize(
    ("pairs", "expected"), [(2, "returned [] for 2 pairs"), (4, "raised ValueError: too many")]
)
def test_what_goes_wrong_later_is_told_as_well(losses: Path, pairs: int, expected: str) -> None:
    loss = load_user_loss(f"{losses}:small")
    with pytest.raises(ConfigError, match=re.escape(f"spin.loss={losses}:small: {expected}")):
        loss(PairLogps(*torch.zeros(4, pairs)), 1.0)


def test_parameters_with_defaults_are_left_to_them(losses: Path) -> None:
    logps = pair(0.5, 0.0, 0.0, 0.0)
    assert load_user_loss(f"{losses}:keyword")(logps, 1.0).item() == pytest.approx(math.exp(-1.0))
