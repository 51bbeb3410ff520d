"""Matrix products in 8 bits, through Transformer Engine's recipes.

Weights, gradients and everything between the products keep their types: bfloat16
parameters with float32 main weights, float32 main gradients. The head that makes
log-probabilities of hidden states has no 8-bit product.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_align_size

from nemo_spin.config.schema import ModelConfig
from nemo_spin.errors import ConfigError, explain

# Compute capability of the first GPUs that have the products of a recipe.
_CAPABILITIES = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
_GENERATIONS = {(8, 9): "Ada", (9, 0): "Hopper", (10, 0): "Blackwell"}


def fp8_settings(model: ModelConfig, *, transformer_engine: bool) -> dict[str, Any]:
    """What Megatron's TransformerConfig is told about `model.fp8`; nothing without it.

    Scales of earlier steps (the recipe `delayed`) are agreed upon by tensor-parallel ranks
    only: data-parallel ranks may run different numbers of microbatches, and a collective
    over them would wait for ever.

    Raises:
        ConfigError: This machine cannot: no GPU, an older one, or no Transformer Engine.
    """
    if model.fp8 is None:
        return {}
    problem = _problem(model.fp8_recipe, transformer_engine=transformer_engine)
    if problem:
        raise ConfigError(
            explain(
                "model.fp8",
                found=f"{model.fp8}, and {problem}",
                rule=f"fp8_recipe {model.fp8_recipe} needs Transformer Engine and a GPU from "
                f"{_GENERATIONS[_CAPABILITIES[model.fp8_recipe]]} on",
                remedy="set model.fp8 to null, or run where these are",
            )
        )
    return {"fp8": model.fp8, "fp8_recipe": model.fp8_recipe, "tp_only_amax_red": True}


def _problem(recipe: str, *, transformer_engine: bool) -> str | None:
    if not torch.cuda.is_available():
        return "there is no GPU here"
    if not transformer_engine:
        return "Transformer Engine is not used here"
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    return None if capability >= _CAPABILITIES[recipe] else f"the GPU is {name}"


def row_alignment(config: Any) -> int:
    """What the number of positions of each rank must be a multiple of; 1 without 8-bit products.

    Args:
        config: Megatron's TransformerConfig.
    """
    return int(get_fp8_align_size(config.fp8_recipe)) if config.fp8 else 1
