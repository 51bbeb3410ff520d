"""Megatron's optimizer wrappers around Adam(W) and PyTorch's RMSProp.

Megatron's wrappers copy main gradients, keep float32 main weights under bf16, clip by
the global norm over all model-parallel ranks and shard states for checkpoints. It knows
Adam and SGD; RMSProp is put in SGD's place inside the same wrapper.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from nemo_spin.config.schema import ModelConfig, OptimConfig


def uses_distributed_optimizer(model: ModelConfig, *, dp_size: int) -> bool:
    """Resolves `model.use_distributed_optimizer`: by default on GPUs with data parallelism and Adam.

    Megatron's distributed optimizer shards and stores the states of Adam alone.
    """
    if model.use_distributed_optimizer is not None:
        return model.use_distributed_optimizer
    return torch.cuda.is_available() and dp_size > 1 and model.optim.name == "adam"


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
    wrapped: list[Any], optim: OptimConfig, *, lr: float, params_dtype: torch.dtype, distributed: bool
) -> MegatronOptimizer:
    """The optimizer of one iteration, with fresh state. All ranks must call.

    Args:
        wrapped: What `wrap_for_training` returned.
        lr: Peak learning rate; the schedule sets each step's.
        params_dtype: bfloat16 keeps float32 main weights.
        distributed: Shard the state over data-parallel ranks.
    """
    config = OptimizerConfig(
        optimizer="adam" if optim.name == "adam" else "sgd",
        lr=lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        sgd_momentum=0.0,
        clip_grad=optim.clip_grad,
        bf16=params_dtype == torch.bfloat16,
        params_dtype=params_dtype,
        use_distributed_optimizer=distributed,
    )
    optimizer = get_megatron_optimizer(config, wrapped, use_gloo_process_groups=False)
    if optim.name == "rmsprop":
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            if not getattr(part, "is_stub_optimizer", False):
                _put_rmsprop(part, optim)
    return optimizer


def _put_rmsprop(part: Any, optim: OptimConfig) -> None:
    """Replaces the inner optimizer; the wrapper's parameter groups (main weights) stay."""
    part.optimizer = torch.optim.RMSprop(
        part.optimizer.param_groups,
        lr=part.config.lr,
        alpha=optim.alpha,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )
    part.init_state_fn = _init_rmsprop_state


def _init_rmsprop_state(optimizer: torch.optim.Optimizer, _config: Any = None) -> None:
    """Gives every parameter the state that a checkpoint is loaded into."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter]["square_avg"] = torch.zeros_like(parameter.data)
