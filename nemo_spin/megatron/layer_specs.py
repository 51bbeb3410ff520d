"""What a family's layers are made of: Megatron's modules, or ours where they differ."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from nemo_spin.megatron.architecture import Architecture
from nemo_spin.megatron.attention import SegmentAttention
from nemo_spin.megatron.compat import mlp_submodules
from nemo_spin.megatron.layers import (
    FamilyLayer,
    ParallelResidualLayer,
    UnbiasedColumnParallelLinear,
    UnbiasedRowParallelLinear,
)
from nemo_spin.megatron.norm import HeadsNorm, LayerNorm, RMSNorm
from nemo_spin.megatron.swiglu import SwiGLU


def gelu_tanh(values: Tensor) -> Tensor:
    """GELU by its approximation with tanh (arXiv 1606.08415), which some families were trained with."""
    return nn.functional.gelu(values, approximate="tanh")


_ACTIVATIONS = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": nn.functional.relu,
}


def family_settings(architecture: Architecture) -> dict[str, Any]:
    """Arguments of Megatron's TransformerConfig that depend on the family alone."""
    sizes = {window for window in architecture.windows if window is not None}
    assert len(sizes) <= 1, "Megatron's layers have one size of window, or none"
    return {
        "normalization": {"rms": "RMSNorm", "layer": "LayerNorm"}[architecture.normalization],
        "layernorm_zero_centered_gamma": architecture.zero_centered_norms,
        "layernorm_epsilon": architecture.norm_epsilon,
        "gated_linear_unit": architecture.gated,
        "activation_func": _ACTIVATIONS[architecture.activation],
        "use_te_activation_func": _has_swiglu(architecture),  # the one that the layer's spec names
        "add_bias_linear": architecture.attention_output_bias or architecture.mlp_bias,
        "add_qkv_bias": architecture.qkv_bias,
        "qk_layernorm": architecture.qk_norm,  # Megatron sums such gradients over ranks: not whole_qk_norm
        "softmax_scale": architecture.softmax_scale,
        "window_size": (sizes.pop() - 1, 0) if sizes else None,
        "window_attn_skip_freq": [int(window is not None) for window in architecture.windows] or None,
        **_expert_settings(architecture),
    }


def _expert_settings(architecture: Architecture) -> dict[str, Any]:
    """Experts without capacity limits and without a loss of their own: tokens go where they are sent."""
    if not architecture.num_experts:
        return {}
    shared = architecture.shared_expert_ffn_hidden_size
    return {
        "num_moe_experts": architecture.num_experts,
        "moe_ffn_hidden_size": architecture.expert_ffn_hidden_size,
        "moe_router_topk": architecture.experts_per_token,
        "moe_router_pre_softmax": not architecture.renormalised_routing,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_shared_expert_intermediate_size": shared or None,
        "moe_shared_expert_gate": bool(shared),
    }


def _has_swiglu(architecture: Architecture) -> bool:
    """Experts have other modules around their gates, and keep Megatron's."""
    return architecture.gated and architecture.activation == "silu" and not architecture.num_experts


def norm_class(architecture: Architecture) -> type:
    """The norm of local layers."""
    return {"rms": RMSNorm, "layer": LayerNorm}[architecture.normalization]


def layer_spec(architecture: Architecture, *, transformer_engine: bool) -> Any:
    """Spec of one layer: Transformer Engine's, or Megatron's local one with our norm and attention."""
    attention: Any = SegmentAttention
    if architecture.attention_logit_cap is not None:
        attention = ModuleSpec(SegmentAttention, params={"logit_cap": architecture.attention_logit_cap})
    if transformer_engine:
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=architecture.num_experts or None, qk_layernorm=architecture.qk_norm
        )
        spec.submodules.self_attention.submodules.core_attention = attention
        _put_activation(spec, architecture)
        return spec
    spec = get_gpt_layer_local_spec(
        num_experts=architecture.num_experts or None,
        qk_layernorm=architecture.qk_norm,
        normalization="RMSNorm",
    )
    spec.submodules.self_attention.submodules.core_attention = attention
    _put_activation(spec, architecture)
    _put_norms(spec, architecture)
    _drop_biases(spec, architecture)
    _put_layer(spec, architecture)
    return spec


def _put_norms(spec: Any, architecture: Architecture) -> None:
    norm = norm_class(architecture)
    layer, attention = spec.submodules, spec.submodules.self_attention
    layer.input_layernorm = layer.pre_mlp_layernorm = norm if architecture.pre_norms else IdentityOp
    if architecture.qk_norm:
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = norm
    if architecture.whole_qk_norm:
        heads = {"q": architecture.num_attention_heads, "k": architecture.num_query_groups}
        for name, count in heads.items():
            spec_of_norm = ModuleSpec(HeadsNorm, params={"num_heads": count})
            setattr(attention.submodules, f"{name}_layernorm", spec_of_norm)


def _put_activation(spec: Any, architecture: Architecture) -> None:
    if _has_swiglu(architecture):
        mlp_submodules(spec.submodules.mlp).activation_func = SwiGLU


def _put_layer(spec: Any, architecture: Architecture) -> None:
    angles = None
    if architecture.windowed_rope is not None:
        angles = tuple(int(window is not None) for window in architecture.windows)
    if architecture.parallel_residual:
        spec.module = ParallelResidualLayer
    elif architecture.post_norms or angles is not None:
        spec.module = FamilyLayer
        post_norm = norm_class(architecture) if architecture.post_norms else None
        spec.params = {**spec.params, "post_norm": post_norm, "angles": angles}


def _drop_biases(spec: Any, architecture: Architecture) -> None:
    if not (architecture.attention_output_bias or architecture.mlp_bias):
        return  # no layer gets a bias, or those of query, key and value alone
    attention, mlp = spec.submodules.self_attention.submodules, mlp_submodules(spec.submodules.mlp)
    if not architecture.qkv_bias:
        attention.linear_qkv = UnbiasedColumnParallelLinear
    if not architecture.attention_output_bias:
        attention.linear_proj = UnbiasedRowParallelLinear
    if not architecture.mlp_bias:
        mlp.linear_fc1, mlp.linear_fc2 = UnbiasedColumnParallelLinear, UnbiasedRowParallelLinear
