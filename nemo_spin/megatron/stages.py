"""What Megatron's TransformerConfig is told about pipeline stages and recomputation."""

from __future__ import annotations

from typing import Any

import torch

from nemo_spin.config.schema import ModelConfig


def pipeline_settings(model: ModelConfig) -> dict[str, Any]:
    """How layers are spread over stages, and how these exchange activations."""
    stages, chunks = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size
    interleaved = chunks is not None
    first, last = model.num_layers_in_first_pipeline_stage, model.num_layers_in_last_pipeline_stage
    if stages == 2 and first is not None:
        last = None  # follows from the first; given both, Megatron divides by its number of middle stages
    return {
        "pipeline_model_parallel_size": stages,
        "virtual_pipeline_model_parallel_size": chunks,
        "num_layers_in_first_pipeline_stage": first,
        "num_layers_in_last_pipeline_stage": last,
        "account_for_embedding_in_pipeline_split": model.account_for_embedding_in_pipeline_split,
        "account_for_loss_in_pipeline_split": model.account_for_loss_in_pipeline_split,
        # An interleaved schedule with two stages sends both ways between the same ranks, where
        # announced lengths would be taken for each other: its microbatches have one shape.
        "variable_seq_lengths": not interleaved,
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        # gloo sends from the tensor itself: what is on its way to another stage must stay
        "deallocate_pipeline_outputs": torch.cuda.is_available() or not interleaved,
    }


def recompute_settings(model: ModelConfig) -> dict[str, Any]:
    """What is computed again in the backward pass in place of being kept."""
    granularity = model.recompute_granularity
    settings: dict[str, Any] = {"recompute_granularity": granularity}
    if granularity == "selective":
        settings["recompute_modules"] = list(model.recompute_modules)
    if granularity == "full":
        settings["recompute_method"] = model.recompute_method
        settings["recompute_num_layers"] = model.recompute_num_layers
    return settings
