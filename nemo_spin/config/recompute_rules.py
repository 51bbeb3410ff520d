"""Rules about recomputation: each of Megatron's granularities has settings of its own."""

from __future__ import annotations

from nemo_spin.config.mistakes import Mistake, mistake
from nemo_spin.config.pipeline_rules import layers_of_chunks
from nemo_spin.config.schema import Config, ModelConfig

_GRANULARITY = "model.recompute_granularity"
_BELONGS = {
    "recompute_modules": ("selective", "the parts of a layer that are computed again"),
    "recompute_method": ("full", "which layers are computed again"),
    "recompute_num_layers": ("full", "how many layers are computed again at a time"),
}
RECOMPUTE_KEYS = (_GRANULARITY, *(f"model.{name}" for name in _BELONGS))


def recomputation_is_of_one_kind(config: Config) -> list[Mistake]:
    """A setting that would do nothing is a misunderstanding."""
    model, defaults = config.model, ModelConfig()
    mistakes = [
        mistake(
            f"model.{name}",
            found=f"{getattr(model, name)}, with {_GRANULARITY} {_spelt(model.recompute_granularity)}",
            rule=f"{meaning} where {_GRANULARITY} is {granularity}",
            remedy=f"set {_GRANULARITY} to {granularity}, or leave it out",
            also=(_GRANULARITY,),
        )
        for name, (granularity, meaning) in _BELONGS.items()
        if getattr(model, name) != getattr(defaults, name) and model.recompute_granularity != granularity
    ]
    if model.recompute_granularity == "selective" and not model.recompute_modules:
        mistakes.append(
            mistake(
                "model.recompute_modules",
                found="empty",
                rule="selective recomputation is of some part of a layer",
                remedy=f"name one, or set {_GRANULARITY} to null",
                also=(_GRANULARITY,),
            )
        )
    return mistakes


def recomputation_fits(config: Config, num_layers: int) -> list[Mistake]:
    """Whether equal groups of layers, which are computed again together, fill a model's stages."""
    model = config.model
    size, layers = model.recompute_num_layers, layers_of_chunks(model, num_layers)
    if model.recompute_granularity != "full" or model.recompute_method != "uniform" or layers is None:
        return []
    chunks = sorted({number for stage in layers for number in stage})
    if not any(number % size for number in chunks):
        return []
    return [
        mistake(
            "model.recompute_num_layers",
            found=f"{size} does not divide the {' and '.join(map(str, chunks))} layers of a stage's chunks",
            rule="where model.recompute_method is uniform, layers are computed again in equal groups",
            remedy="set it to 1, or model.recompute_method to block",
            also=("model.recompute_method",),
        )
    ]


def _spelt(value: str | None) -> str:
    return "null" if value is None else value
