from __future__ import annotations

import pytest

from nemo_spin.config.expert_rules import check_experts_fit
from nemo_spin.config.load import from_mapping
from nemo_spin.config.schema import Config
from nemo_spin.config.validate import find_mistakes
from nemo_spin.errors import ConfigError


def configured(expert: int, *, devices: int = 4, **model: object) -> Config:
    sizes = {"expert_model_parallel_size": expert, **model}
    return from_mapping({"model": sizes, "trainer": {"devices": devices, "accelerator": "gpu"}})


def mistakes(config: Config) -> list[str]:
    return [entry.text for entry in find_mistakes(config, command=None)]


@pytest.mark.parametrize(
    ("expert", "model"),
    [
        (4, {}),
        (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (2, {"pipeline_model_parallel_size": 2}),
    ],
)
def test_experts_are_spread_over_any_ranks_of_a_stage(expert: int, model: dict[str, object]) -> None:
    assert mistakes(configured(expert, **model)) == []


def test_more_ranks_for_experts_than_a_stage_has() -> None:
    (found,) = mistakes(configured(4, pipeline_model_parallel_size=2))
    assert "model.expert_model_parallel_size: 4, with 2 ranks in each of 2 pipeline stages" in found
    assert "set it to a divisor of 2" in found


@pytest.mark.parametrize(
    ("expert", "num_experts", "found"),
    [(2, 0, "2, and the model has no experts"), (4, 6, "4, and the model has 6 experts in a layer")],
)
def test_experts_that_ranks_cannot_share(expert: int, num_experts: int, found: str) -> None:
    check_experts_fit(configured(1), num_experts=num_experts)
    with pytest.raises(ConfigError, match=found):
        check_experts_fit(configured(expert), num_experts=num_experts)


def test_what_experts_do_not_go_with() -> None:
    config = configured(2, tensor_model_parallel_size=2)
    config.model.fp8 = "hybrid"
    config.model.recompute_modules = ["core_attn", "mlp"]
    config.model.recompute_granularity = "selective"
    check_experts_fit(configured(1, tensor_model_parallel_size=2), num_experts=0)
    with pytest.raises(ConfigError) as caught:
        check_experts_fit(config, num_experts=8)
    assert "model.sequence_parallel: false" in str(caught.value)
    assert "model.fp8: hybrid" in str(caught.value)
    assert "model.recompute_modules: ['core_attn', 'mlp'], and the model has experts" in str(caught.value)
    config.model.recompute_granularity = "full"
    with pytest.raises(ConfigError) as caught:
        check_experts_fit(config, num_experts=8)
    assert "recompute_modules" not in str(caught.value)
