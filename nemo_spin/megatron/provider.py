"""Builds Megatron's GPTModel for the architecture of a Hugging Face checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_spin.config.schema import ModelConfig
from nemo_spin.errors import ConfigError, explain
from nemo_spin.megatron.architecture import Architecture
from nemo_spin.megatron.compat import complete_router, has_transformer_engine, norms_are_built
from nemo_spin.megatron.fp8 import fp8_settings
from nemo_spin.megatron.layer_specs import family_settings, layer_spec, norm_class
from nemo_spin.megatron.rope import PositionedRotaryEmbedding, concentration_as_scaling_factor
from nemo_spin.megatron.stages import pipeline_settings, recompute_settings
from nemo_spin.megatron.vocab_parallel import withhold_logits

_GPU_VOCABULARY_MULTIPLE = 128  # rows per rank that GPU matrix kernels like


def uses_transformer_engine(
    transformer_impl: str, architecture: Architecture, *, params_dtype: torch.dtype
) -> bool:
    """Resolves `model.transformer_impl` on this machine, for this model.

    `auto` takes local layers in float32, whose products Transformer Engine would make in TF32: ten bits
    in place of 23, and log-probabilities that are not the sampler's.

    Raises:
        ConfigError: Transformer Engine was asked for but is not installed, or there is no GPU,
            or the model's layers are not made of it.
    """
    available = torch.cuda.is_available() and has_transformer_engine()
    if transformer_impl == "transformer_engine" and not available:
        raise ConfigError(
            explain(
                "model.transformer_impl",
                found="transformer_engine, which is not usable here",
                rule="Transformer Engine needs a GPU and its package",
                remedy="set model.transformer_impl=auto, or run in a container that has it",
            )
        )
    obstacle = architecture.without_transformer_engine
    if transformer_impl == "transformer_engine" and obstacle is not None:
        raise ConfigError(
            explain(
                "model.transformer_impl",
                found=f"transformer_engine, and {architecture.hf_architecture} has {obstacle}",
                rule="such layers are Megatron's local ones",
                remedy="set model.transformer_impl=auto",
            )
        )
    wanted = transformer_impl == "transformer_engine" or (
        transformer_impl == "auto" and params_dtype != torch.float32
    )
    return available and wanted and obstacle is None


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int) -> int:
    """Vocabulary rows in all ranks: the next multiple that every rank can hold an equal share of."""
    per_rank = _GPU_VOCABULARY_MULTIPLE if torch.cuda.is_available() else 1
    multiple = tensor_model_parallel_size * per_rank
    return (vocab_size + multiple - 1) // multiple * multiple


def _leave_uninitialised(weight: torch.Tensor) -> torch.Tensor:
    """Stands for an initialisation: weights are always loaded.

    Megatron's `perform_initialization=False` would say the same, but then parameters are
    not marked as split over ranks, and the gradient norm counts one rank's share only.
    """
    return weight


def transformer_config(
    architecture: Architecture, model: ModelConfig, *, params_dtype: torch.dtype
) -> TransformerConfig:
    """Megatron's configuration of the model and of how it is split.

    Losses are summed over pairs and divided once by their number in the global batch,
    which is what Megatron's `calculate_per_token_loss` does with any count.
    """
    half = params_dtype == torch.bfloat16
    rope_factor = concentration_as_scaling_factor(architecture.rope)
    transformer_engine = uses_transformer_engine(
        model.transformer_impl, architecture, params_dtype=params_dtype
    )
    config = TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.head_dim,
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        context_parallel_size=model.context_parallel_size,
        expert_model_parallel_size=model.expert_model_parallel_size,
        expert_tensor_parallel_size=1,  # an expert is whole on its rank
        sequence_parallel=model.sequence_parallel,
        pipeline_dtype=params_dtype,
        params_dtype=params_dtype,
        bf16=half,
        disable_bf16_reduced_precision_matmul=half,  # sums in float32, whatever the shape of a product
        moe_token_dispatcher_type="alltoall",  # the one that Megatron allows beside it
        **family_settings(architecture),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        # Megatron's kernels have no factor; the CPU backend stands in for Transformer Engine's
        apply_rope_fusion=rope_factor is None and (transformer_engine or not torch.cuda.is_available()),
        persist_layer_norm=transformer_engine,
        init_method=_leave_uninitialised,
        output_layer_init_method=_leave_uninitialised,
        embedding_init_method=_leave_uninitialised,
        calculate_per_token_loss=True,
        **pipeline_settings(model),
        **recompute_settings(model),
        **fp8_settings(model, transformer_engine=transformer_engine),
    )
    if rope_factor is not None:
        config.yarn_rotary_scaling_factor = rope_factor  # read by Megatron's attention
    return config


def build_model(
    architecture: Architecture, model: ModelConfig, *, params_dtype: torch.dtype
) -> list[GPTModel]:
    """This rank's share of the model, uninitialised. All ranks must call.

    Args:
        architecture: What the checkpoint's configuration says.
        model: Parallel sizes, layer implementation and recomputation.
        params_dtype: Type of the parameters.

    Returns:
        One GPTModel per model chunk of this rank (one without interleaving), on this
        rank's device, withholding logits on the last stage.
    """
    config = transformer_config(architecture, model, params_dtype=params_dtype)
    if architecture.num_experts:
        complete_router()
    interleaved = model.virtual_pipeline_model_parallel_size
    stages = range(interleaved) if interleaved else [None]
    chunks = [_build_chunk(architecture, model, config, stage) for stage in stages]
    for name, parameter in (named for chunk in chunks for named in chunk.named_parameters()):
        if ".local_experts." in name:
            # Copies of it lie on tensor-parallel ranks too; Megatron marks it with expert parallelism alone.
            parameter.allreduce = False
    return chunks


def _build_chunk(
    architecture: Architecture, model: ModelConfig, config: TransformerConfig, vp_stage: int | None
) -> GPTModel:
    transformer_engine = uses_transformer_engine(
        model.transformer_impl, architecture, params_dtype=config.params_dtype
    )
    spec = layer_spec(architecture, transformer_engine=transformer_engine)
    if not transformer_engine:
        layers = get_num_layers_to_build(config, vp_stage=vp_stage)
        spec = TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=norm_class(architecture))
    is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    with norms_are_built(config, architecture.whole_qk_norm):
        gpt = GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=padded_vocab_size(architecture.vocab_size, model.tensor_model_parallel_size),
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=is_last,
            parallel_output=True,
            share_embeddings_and_output_weights=architecture.tie_word_embeddings,
            position_embedding_type="learned_absolute" if architecture.learned_positions else "rope",
            vp_stage=vp_stage,
        )
    if not architecture.learned_positions:
        gpt.rotary_pos_emb = PositionedRotaryEmbedding(
            architecture.rope, architecture.head_dim, config, windowed=architecture.windowed_rope
        )
        gpt.rotary_pos_emb.attach(gpt)
    if gpt.pre_process:
        _finish_embedding(gpt.embedding, architecture)
    if is_last:
        withhold_logits(gpt, logit_cap=architecture.logit_cap)
    return gpt.to(torch.cuda.current_device())


def _finish_embedding(embedding: Any, architecture: Architecture) -> None:
    """What Megatron's embedding does not do: the type of its positions, and a scale."""
    params_dtype = embedding.config.params_dtype
    if architecture.learned_positions:
        positions = embedding.position_embeddings.to(params_dtype)
        last = architecture.max_position_embeddings - 1
        # padding at a row's end may lie beyond the table
        positions.register_forward_pre_hook(lambda _, ids: (ids[0].clamp(max=last),))
    if architecture.embedding_scale is not None:
        scale = torch.tensor(architecture.embedding_scale, dtype=params_dtype).item()

        def scaled(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            return output * scale

        embedding.register_forward_hook(scaled)
