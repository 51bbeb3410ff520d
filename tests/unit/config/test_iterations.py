"""Values that differ between iterations."""

from __future__ import annotations

import pytest

from nemo_spin.config.iterations import at_iteration, config_at, mixed_iterations
from nemo_spin.config.load import from_mapping
from nemo_spin.config.schema import Config, SpinConfig
from nemo_spin.config.validate import validate
from nemo_spin.errors import ConfigError
from tests.unit.config.test_validate import accepted, refused


def test_a_scalar_holds_in_all() -> None:
    assert [at_iteration(0.1, iteration) for iteration in range(3)] == [0.1, 0.1, 0.1]


def test_a_list_has_one_for_each() -> None:
    assert [at_iteration([0.1, 0.2, 5], iteration) for iteration in range(3)] == [0.1, 0.2, 5]


@pytest.mark.parametrize("iteration", [-1, 2])
def test_an_iteration_that_the_list_does_not_have(iteration: int) -> None:
    with pytest.raises(AssertionError, match="of a list of 2"):
        at_iteration([1, 2], iteration)


def changed(changes: object, **spin: object) -> Config:
    return from_mapping({"spin": {"per_iteration": changes, **spin}})


def test_what_differs_in_an_iteration() -> None:
    config = changed({1: {"model.optim.name": "adam", "generation.top_k": 5}})
    second = config_at(config, 1)
    assert (second.model.optim.name, second.generation.top_k) == ("adam", 5)
    assert second.model.optim.eps == config.model.optim.eps and second.spin.per_iteration == {}
    assert config_at(config, 0) is config and config_at(config, None) is config


def test_a_change_in_the_first_holds_for_theta_0() -> None:
    config = changed({0: {"generation.temperature": 0.5}})
    assert config_at(config, None).generation.temperature == 0.5


@pytest.mark.parametrize(("history", "expected"), [(0, [2]), (1, [1, 2]), (5, [0, 1, 2])])
def test_whose_answers_are_mixed(history: int, expected: list[int]) -> None:
    assert mixed_iterations(SpinConfig(history=history), 2) == expected


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({3: {"generation.top_k": 5}}, "'3' is no iteration: there are 3"),
        ({"last": {"generation.top_k": 5}}, "'last' is no iteration"),
        ({0: 5}, "5 at 0"),
        ({0: {"spin.beta": 5}}, "'spin.beta' at 0"),
        ({0: {"model.optim.lr": 5}}, "'model.optim.lr' at 0"),
        ({1: {"model.optim.name": "sgd"}}, "iteration 1: model.optim.name: 'sgd'"),
        ({1: {"generation.top_p": 2.0}}, "iteration 1: generation.top_p: 2.0"),
        ({1: {"generation.max_tokens": "many"}}, "iteration 1: generation.max_tokens: 'many'"),
    ],
)
def test_changes_that_are_refused(changes: object, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(changed(changes), command=None)
    assert found in str(caught.value)


def test_an_optimizer_cannot_change_where_its_state_is_carried_over() -> None:
    config = changed({1: {"model.optim.name": "adam"}})
    config.model.optim.carry_over = True
    with pytest.raises(ConfigError, match="carry_over takes over its state"):
        validate(config, command=None)


def test_numbers_that_may_be_left_out() -> None:
    accepted("spin.max_steps=[10,null,5]", "spin.num_prompts=1000")
    assert "spin.max_steps" in refused("spin.max_steps=[0,1,2]")
    assert "spin.epochs" in refused("spin.epochs=null")
