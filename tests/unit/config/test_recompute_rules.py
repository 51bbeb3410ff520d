"""Settings of recomputation that would do nothing, or cannot be met."""

from __future__ import annotations

from nemo_spin.config.recompute_rules import recomputation_fits
from nemo_spin.config.schema import Config, ModelConfig
from tests.unit.config.test_validate import accepted, refused

FULL, SELECTIVE = "model.recompute_granularity=full", "model.recompute_granularity=selective"


def test_settings_belong_to_a_granularity() -> None:
    accepted(SELECTIVE, "model.recompute_modules=[mlp]")
    accepted(FULL, "model.recompute_method=block", "model.recompute_num_layers=3")
    assert "model.recompute_modules: ['mlp'], with model.recompute_granularity null" in refused(
        "model.recompute_modules=[mlp]"
    )
    assert "model.recompute_num_layers: 2, with model.recompute_granularity selective" in refused(
        SELECTIVE, "model.recompute_num_layers=2"
    )
    assert "some part of a layer" in refused(SELECTIVE, "model.recompute_modules=[]")
    assert "must be core_attn or mlp" in refused(SELECTIVE, "model.recompute_modules=[core_attn,norm]")


def problems(num_layers: int, **settings: object) -> list[str]:
    model = ModelConfig(recompute_granularity="full", **settings)  # type: ignore[arg-type]
    return [found.text for found in recomputation_fits(Config(model=model), num_layers)]


def test_groups_of_layers_fill_stages() -> None:
    assert problems(8, recompute_num_layers=4) == []
    assert "3 does not divide the 8 layers" in problems(8, recompute_num_layers=3)[0]
    assert problems(8, recompute_num_layers=3, recompute_method="block") == []
    uneven = {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 2}
    assert "2 does not divide the 2 and 3 layers" in problems(5, recompute_num_layers=2, **uneven)[0]
    assert problems(6, recompute_num_layers=2, **uneven) == []
