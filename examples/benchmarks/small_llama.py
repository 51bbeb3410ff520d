"""A Llama with random weights, as a Hugging Face directory and as this project's engine at one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_llama(directory: Path, *, vocabulary: int, hidden: int, layers: int) -> Path:
    """A float32 checkpoint, the same for the same sizes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=max(2, hidden // 64),
        num_key_value_heads=max(2, hidden // 128),
        max_position_embeddings=4096,
    )
    LlamaForCausalLM(shape).save_pretrained(directory)
    return directory


def engine_of(directory: Path, *, optim: Any = None, recompute: bool = False) -> Any:
    """Ready to train, with `OptimConfig`'s optimizer; learning rates are given step by step.

    Several ranks (`RANK`, `WORLD_SIZE`, `MASTER_*`) are data-parallel, and share the optimizer's state out.

    Args:
        directory: As `write_llama` makes it.
        optim: None: the default.
        recompute: Activations are computed again in the backward pass, layer by layer.
    """
    import torch

    from nemo_spin.bridge.families import architecture_of
    from nemo_spin.bridge.import_hf import load_weights
    from nemo_spin.config.schema import ModelConfig
    from nemo_spin.megatron.engine import Engine, layout_of
    from nemo_spin.megatron.optimizers import build_optimizer, uses_distributed_optimizer, wrap_for_training
    from nemo_spin.megatron.provider import build_model
    from nemo_spin.megatron.runtime import initialize

    runtime = initialize(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, seed=0)
    config, architecture = ModelConfig(path=str(directory)), architecture_of(directory)
    if recompute:
        config.recompute_granularity = "full"
    chunks = build_model(architecture, config, params_dtype=torch.float32)
    load_weights(chunks, directory, architecture)
    shared = uses_distributed_optimizer(config, dp_size=runtime.dp_size)
    wrapped = wrap_for_training(chunks, distributed_optimizer=shared)
    optimizer = build_optimizer(
        wrapped, optim or config.optim, lr=0.0, params_dtype=torch.float32, distributed=shared
    )
    return Engine(wrapped, runtime, architecture.vocab_size, layout_of(config), optimizer)
