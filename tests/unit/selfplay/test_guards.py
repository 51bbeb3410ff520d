"""Thresholds, levels and messages of guards.

The failures themselves: `tests/functional/test_guards.py`; for trainings and scorings, `tests/distributed`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from nemo_spin.config.load import from_mapping
from nemo_spin.config.rules import GUARDS
from nemo_spin.config.schema import Config, GuardsConfig, Thresholds
from nemo_spin.selfplay.guarding import TrainingWatch, error_of
from nemo_spin.selfplay.guards import (
    STOP,
    WARN,
    Finding,
    StepGuards,
    heldout_real_logps,
    of_answers,
    of_evaluation,
    of_scores,
    of_steps,
    of_training,
)
from tests.unit.config.test_validate import accepted, refused

FINE: dict[str, Any] = {
    "mean_length": 10.0,
    "real_mean_length": 11.0,
    "empty_share": 0.0,
    "repetitive_share": 0.0,
    "duplicate_share": 0.0,
    "distinct_share": 1.0,
    "cut_share": 0.1,
    "eos_share": 0.9,
    "equal_share": 0.3,
}


def step(number: int, fall: float, margin: float = 0.0, **more: Any) -> dict[str, Any]:
    """A line of metrics.jsonl whose real responses of 4 tokens fell by `fall` nats a token."""
    return {
        "step": number,
        "loss": 0.5,
        "real_tokens": 4.0,
        "opponent_real_logps": -8.0,
        "policy_real_logps": -8.0 - 4 * fall,
        "margin": margin,
        **more,
    }


@pytest.mark.parametrize(
    ("name", "value", "level"),
    [
        ("empty_share", 0.02, WARN),
        ("empty_share", 0.95, STOP),
        ("repetitive_share", 0.2, WARN),
        ("duplicate_share", 0.5, WARN),
        ("distinct_share", 0.1, WARN),
        ("cut_share", 1.0, WARN),
        ("eos_share", 0.0, WARN),
        ("equal_share", 0.8, WARN),
        ("equal_share", 1.0, STOP),
    ],
)
def test_one_bad_number_fires_one_guard(name: str, value: float, level: str) -> None:
    assert of_answers(FINE, {}, GuardsConfig()) == []
    (finding,) = of_answers({**FINE, name: value}, {}, GuardsConfig())
    assert (finding.guard, finding.level, finding.value) == (name, level, value)


@pytest.mark.parametrize(("mean", "fires"), [(4.0, True), (24.0, True), (6.0, False), (21.0, False)])
def test_length_drift_is_a_factor_either_way(mean: float, fires: bool) -> None:
    found = of_answers({**FINE, "mean_length": mean}, {}, GuardsConfig())
    assert [entry.guard for entry in found] == (["length_drift"] if fires else [])


def test_a_share_of_demonstrations_that_falls() -> None:
    (finding,) = of_answers(FINE, {**FINE, "equal_share": 0.4}, GuardsConfig())
    assert finding.guard == "equal_fall" and finding.value == pytest.approx(0.1)
    assert of_answers(FINE, {**FINE, "equal_share": 0.2}, GuardsConfig()) == []


def test_a_threshold_of_null_is_none() -> None:
    guards = GuardsConfig(equal_share=Thresholds(None, None))
    assert of_answers({**FINE, "equal_share": 1.0}, {}, guards) == []


def test_numbers_that_are_not_there_fire_nothing() -> None:
    assert of_answers({}, {}, GuardsConfig()) == of_scores({}, GuardsConfig()) == []
    assert of_training({}, GuardsConfig()) == of_evaluation({}, {}, GuardsConfig()) == []


def test_falling_real_log_probabilities_warn_then_stop_once_each() -> None:
    watch = StepGuards(GuardsConfig(window_steps=2))
    found = [watch.add(step(number, fall)) for number, fall in enumerate([0.9, 0.0, 0.1, 0.2, 0.9, 0.9])]
    assert [[(entry.level, entry.step) for entry in entries] for entries in found] == [
        [],  # a window is not full yet
        [(WARN, 1)],
        [],
        [],
        [(STOP, 4)],
        [],
    ]
    assert found[4][0].value == pytest.approx(0.55)


def test_a_margin_that_is_saturated() -> None:
    watch = StepGuards(GuardsConfig(window_steps=1))
    assert watch.add(step(0, 0.0, margin=9.9)) == []
    assert [entry.guard for entry in watch.add(step(1, -0.1, margin=12.0))] == ["margin_saturated"]


@pytest.mark.parametrize("name", ["loss", "grad_norm", "policy_real_logps"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_stops_at_once_and_always(name: str, value: float) -> None:
    config = from_mapping({"selfplay": {"stop": False}})
    (finding,) = StepGuards(config.selfplay.guards).add(step(7, 0.0) | {name: value})
    assert (finding.guard, finding.level, finding.step) == ("not_finite", STOP, 7)
    error = error_of(config, "train of iteration 1", [finding])
    assert error is not None and f"{name} is {value} at step 7" in str(error) and error.exit_code == 3


def test_plain_fine_tuning_has_no_opponent_to_fall_below() -> None:
    assert StepGuards(GuardsConfig(window_steps=1)).add({"step": 0, "loss": 1.0, "real_tokens": 3.0}) == []


def test_held_out_demonstrations_that_became_less_likely() -> None:
    counts = {
        "heldout_loss": 0.7,
        "heldout_policy_real_logps": -24.0,
        "heldout_policy_real_logps_per_token": -2.0,  # 12 tokens
        "heldout_opponent_real_logps": -18.0,
    }
    assert heldout_real_logps(counts, "opponent") == pytest.approx(-1.5)
    (finding,) = of_training(counts, GuardsConfig())
    assert (finding.guard, finding.level, finding.value) == ("heldout_fall", STOP, pytest.approx(0.5))


def test_an_iteration_that_is_not_better() -> None:
    before = {"sampled": {"score": 0.5}, "greedy": {"score": 0.8}}
    assert of_evaluation({"sampled": {"score": 0.5}, "greedy": {"score": 0.9}}, before, GuardsConfig()) == []
    (finding,) = of_evaluation({"sampled": {"score": 0.6}, "greedy": {"score": 0.6}}, before, GuardsConfig())
    assert (finding.guard, finding.level) == ("score_drop", STOP)
    assert finding.value == pytest.approx(0.25)


def test_only_stops_raise_and_only_where_they_may() -> None:
    warn, stop = (Finding("cut_share", level, 1.0, 0.5, "cut", None) for level in (WARN, STOP))
    assert error_of(Config(), "generate", [warn]) is None
    assert error_of(from_mapping({"selfplay": {"stop": False}}), "generate", [stop]) is None
    error = error_of(Config(), "generate of iteration 1", [warn, stop])
    assert error is not None
    assert str(error).startswith("generate of iteration 1: guard cut_share: cut")
    assert "selfplay.guards.cut_share.stop=null" in str(error)


def test_the_watch_notes_before_it_raises() -> None:
    notes: list[str] = []
    config = from_mapping({"selfplay": {"stop": False, "guards": {"window_steps": 1}}})
    TrainingWatch(config, "train", notes.append)(step(3, 0.7))
    assert len(notes) == 1 and notes[0].startswith(
        "guard real_fall (stop): demonstrations became less likely"
    )


def test_a_guard_warns_before_it_stops() -> None:
    accepted("selfplay.guards.cut_share.warn=null", "selfplay.guards.cut_share.stop=0.1")
    accepted("selfplay.guards.eos_share.stop=0.01")
    assert "a guard warns before it stops" in refused("selfplay.guards.cut_share.stop=0.1")
    assert "a guard warns before it stops" in refused("selfplay.guards.eos_share.stop=0.9")
    assert "selfplay.guards.real_fall.warn" in refused("selfplay.guards.real_fall.warn=-1")


def test_every_guard_has_thresholds() -> None:
    guards = GuardsConfig()
    assert all(isinstance(getattr(guards, name), Thresholds) for name in GUARDS) and len(GUARDS) == 14


def of_answers_with(**counts: float) -> Callable[[GuardsConfig], list[Finding]]:
    return lambda guards: of_answers({**FINE, **counts}, {"equal_share": 0.3}, guards)


# Guard -> something in which it sees the worst, and no other guard anything.
FIRES: dict[str, Callable[[GuardsConfig], list[Finding]]] = {
    **{
        name: of_answers_with(**{name: 1.0})
        for name in ("empty_share", "repetitive_share", "duplicate_share")
    },
    **{name: of_answers_with(**{name: 0.0}) for name in ("distinct_share", "eos_share")},
    "cut_share": of_answers_with(cut_share=1.0),
    "length_drift": of_answers_with(mean_length=1.0),
    "equal_share": of_answers_with(equal_share=1.0),
    "equal_fall": of_answers_with(equal_share=0.0),
    "real_fall": lambda guards: of_steps(ten_steps(fall=5.0), guards),
    "margin_saturated": lambda guards: of_steps(ten_steps(margin=50.0), guards),
    "sampler_difference": lambda guards: of_scores({"sampler_difference": 9.0}, guards),
    "heldout_fall": lambda guards: of_training(
        {
            "heldout_policy_real_logps": -24.0,
            "heldout_policy_real_logps_per_token": -2.0,
            "heldout_opponent_real_logps": -6.0,
        },
        guards,
    ),
    "score_drop": lambda guards: of_evaluation(
        {"greedy": {"score": 0.0}}, {"greedy": {"score": 1.0}}, guards
    ),
}


def ten_steps(**values: float) -> list[dict[str, Any]]:
    return [step(number, **{"fall": 0.0, **values}) | {"split": "train"} for number in range(10)]


@pytest.mark.parametrize("name", GUARDS)
def test_every_guard_fires_by_its_own_thresholds(name: str) -> None:
    assert {entry.guard for entry in FIRES[name](GuardsConfig())} == {name}
    for level, thresholds in ((WARN, Thresholds(warn=0.1)), (STOP, Thresholds(stop=0.1))):
        (finding,) = FIRES[name](replace(GuardsConfig(), **{name: thresholds}))
        assert (finding.level, finding.threshold) == (level, 0.1)
    assert FIRES[name](replace(GuardsConfig(), **{name: Thresholds()})) == []
