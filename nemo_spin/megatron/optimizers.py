"""Megatron's optimizer wrappers around Adam(W) and PyTorch's RMSProp.

Megatron's wrappers copy main gradients, keep float32 main weights under bf16, clip by
the global norm over all model-parallel ranks and share the state out over data-parallel
ranks. They are built around Adam (Transformer Engine's or Apex's fused one where there is
one, else PyTorch's AdamW); PyTorch's RMSProp is put in its place inside the same wrapper,
and steps the very same parameters or slices of them.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from nemo_spin.config.schema import ModelConfig, OptimConfig
from nemo_spin.errors import ConfigError, explain
from nemo_spin.megatron.compat import has_transformer_engine
from nemo_spin.megatron.optimizer_state import optimizer_parts


def adam_package() -> str:
    """The package whose Adam Megatron builds its optimizers around: transformer_engine, apex or torch."""
    return str(megatron_optimizer.Adam.__module__).split(".")[0]


def uses_distributed_optimizer(model: ModelConfig, *, dp_size: int) -> bool:
    """Resolves `model.use_distributed_optimizer`: by default where there is data parallelism.

    Megatron offloads the state of its distributed optimizer alone.
    """
    if model.use_distributed_optimizer is not None:
        return model.use_distributed_optimizer
    return dp_size > 1 or model.optimizer_cpu_offload


def offloaded_share(model: ModelConfig) -> float | None:
    """Share of the weights whose Adam state and updates are the CPU's; None without offloading.

    Raises:
        ConfigError: Transformer Engine is not installed.
    """
    if not model.optimizer_cpu_offload:
        return None
    if not has_transformer_engine():
        raise ConfigError(
            explain(
                "model.optimizer_cpu_offload",
                found="true, and Transformer Engine is not installed",
                rule="Megatron offloads beside Transformer Engine's fused Adam",
                remedy="install it, or set model.optimizer_cpu_offload to false",
            )
        )
    return model.optimizer_offload_fraction


def wrap_for_training(
    chunks: list[GPTModel], *, distributed_optimizer: bool, model: ModelConfig | None = None
) -> list[Any]:
    """Megatron's data parallelism: gradients accumulate in float32 and are summed at the end of a step.

    Args:
        model: Says whether sending overlaps computing; None: it does not.
    """
    overlap_grads = model is not None and model.overlap_grad_reduce
    overlap_weights = model is not None and model.overlap_param_gather and distributed_optimizer
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap_grads,
        overlap_param_gather=overlap_weights,
        use_distributed_optimizer=distributed_optimizer,
    )
    wrapped = [
        DistributedDataParallel(config=chunk.config, ddp_config=ddp_config, module=chunk) for chunk in chunks
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped


def build_optimizer(
    wrapped: list[Any],
    optim: OptimConfig,
    *,
    lr: float,
    params_dtype: torch.dtype,
    distributed: bool,
    offload_fraction: float | None = None,
) -> MegatronOptimizer:
    """The optimizer of one iteration, with fresh state. All ranks must call.

    Args:
        wrapped: What `wrap_for_training` returned.
        lr: Peak learning rate; the schedule sets each step's.
        params_dtype: bfloat16 keeps float32 main weights.
        distributed: Shard the state over data-parallel ranks.
        offload_fraction: Share of the weights whose Adam states and updates are the CPU's;
            None: no offloading. It needs `distributed`.
    """
    config = OptimizerConfig(
        optimizer="adam",  # the only one that Megatron's distributed optimizer is built around
        lr=lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=params_dtype == torch.bfloat16,
        params_dtype=params_dtype,
        use_distributed_optimizer=distributed,
        optimizer_cpu_offload=offload_fraction is not None,
        optimizer_offload_fraction=offload_fraction or 0.0,
        use_precision_aware_optimizer=offload_fraction is not None,  # which then keeps the main weights
    )
    with torch.no_grad():  # slices of float32 weights with a graph would keep the model alive for ever
        optimizer = get_megatron_optimizer(config, wrapped, use_gloo_process_groups=False)
    for part in optimizer_parts(optimizer):
        if optim.name == "rmsprop":
            _put_rmsprop(part, optim)
        _step_each_weight_alone(part.optimizer)
    return optimizer


def _step_each_weight_alone(inner: Any) -> None:
    """Has PyTorch's own optimizers hold a term of the update for one weight at a time.

    On GPUs they make it for all weights at once by default (`foreach`), a copy of the whole state:
    4 bytes a weight, more than is left of a GPU that the rest was planned for. On the CPU a fused
    Adam needs none, in one pass.
    """
    if not isinstance(inner, (torch.optim.Adam, torch.optim.RMSprop)):
        return  # fused ones of other packages
    in_one_pass = isinstance(inner, torch.optim.Adam) and not torch.cuda.is_available()
    for group in inner.param_groups:
        group |= {"fused": True} if in_one_pass else {"foreach": False}


def _put_rmsprop(part: Any, optim: OptimConfig) -> None:
    """Replaces the inner optimizer, which has no state yet; the wrapper's main weights and slices stay."""
    adam = part.optimizer
    part.optimizer = torch.optim.RMSprop(
        [{**_without(group, adam.defaults), "params": []} for group in adam.param_groups],
        lr=part.config.lr,
        alpha=optim.alpha,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )
    for group, same in zip(part.optimizer.param_groups, adam.param_groups, strict=True):
        group["params"] = same["params"]  # slices of parameters, which a constructor would refuse


def _without(group: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Of a parameter group what Megatron put there, and no optimizer's own settings."""
    return {key: value for key, value in group.items() if key not in defaults}
