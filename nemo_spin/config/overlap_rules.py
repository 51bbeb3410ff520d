"""Rules about what is sent between data-parallel ranks while something is computed."""

from __future__ import annotations

from nemo_spin.config.mistakes import Mistake, mistake
from nemo_spin.config.schema import Config

_GRADIENTS, _WEIGHTS = "model.overlap_grad_reduce", "model.overlap_param_gather"
OVERLAP_KEYS = (_GRADIENTS, _WEIGHTS, "model.use_distributed_optimizer")


def overlap_has_something_to_overlap(config: Config) -> list[Mistake]:
    """Weights are gathered under the distributed optimizer only, and in the buckets of gradients."""
    model = config.model
    if not model.overlap_param_gather:
        return []
    mistakes = []
    if model.use_distributed_optimizer is False:
        mistakes.append(
            mistake(
                _WEIGHTS,
                found="true, with model.use_distributed_optimizer false",
                rule="weights are gathered where the distributed optimizer has updated a share of them",
                remedy="set it to false, or model.use_distributed_optimizer to true",
                also=("model.use_distributed_optimizer",),
            )
        )
    if not model.overlap_grad_reduce:
        mistakes.append(
            mistake(
                _WEIGHTS,
                found=f"true, with {_GRADIENTS} false",
                rule="weights are gathered in the buckets that gradients are reduced in",
                remedy=f"set {_GRADIENTS} to true, or both to false",
                also=(_GRADIENTS,),
            )
        )
    return mistakes
