from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_spin.config.fp8_rules import width_multiple
from nemo_spin.config.rules import NAMES
from nemo_spin.config.schema import ModelConfig
from nemo_spin.errors import ConfigError
from nemo_spin.megatron.fp8 import fp8_settings, row_alignment

RECIPES = NAMES["model.fp8_recipe"]


def on_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """Stands in for a GPU, which tests of refusals have not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


def test_nothing_is_said_without_it() -> None:
    assert fp8_settings(ModelConfig(), transformer_engine=False) == {}


@pytest.mark.parametrize("recipe", RECIPES)
def test_megatron_takes_every_recipe(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, (10, 0))
    settings = fp8_settings(ModelConfig(fp8="hybrid", fp8_recipe=recipe), transformer_engine=True)
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=2, bf16=True, **settings)
    assert (config.fp8, config.fp8_recipe) == ("hybrid", recipe)
    assert config.tp_only_amax_red
    assert row_alignment(config) == width_multiple(recipe) == (32 if recipe == "mxfp8" else 16)


def test_rows_need_no_alignment_without_it() -> None:
    config: Any = SimpleNamespace(fp8=None, fp8_recipe="mxfp8")
    assert row_alignment(config) == 1


@pytest.mark.parametrize(
    ("recipe", "capability"),
    [("tensorwise", (8, 0)), ("delayed", (8, 6)), ("blockwise", (8, 9)), ("mxfp8", (9, 0))],
)
def test_an_older_gpu_is_refused(
    recipe: str, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu(monkeypatch, capability)
    with pytest.raises(ConfigError, match="the GPU is a GPU"):
        fp8_settings(ModelConfig(fp8="e4m3", fp8_recipe=recipe), transformer_engine=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_machine_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no GPU here"):
        fp8_settings(ModelConfig(fp8="hybrid"), transformer_engine=False)


def test_layers_that_are_not_transformer_engines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, (9, 0))
    with pytest.raises(ConfigError, match="Transformer Engine is not used here"):
        fp8_settings(ModelConfig(fp8="hybrid"), transformer_engine=False)
