"""Layers that differ from Megatron's own in one respect each, for the families that need it.

A parameter that Megatron's layer does not have is named here; `bridge/families` maps it.
"""

from __future__ import annotations

import functools
from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class UnbiasedColumnParallelLinear(ColumnParallelLinear):
    """Has no bias, where Megatron's configuration gives one to every linear layer."""

    def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
        super().__init__(*args, bias=False, **kwargs)


class UnbiasedRowParallelLinear(RowParallelLinear):
    """Has no bias, where Megatron's configuration gives one to every linear layer."""

    def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
        super().__init__(*args, bias=False, **kwargs)


class FamilyLayer(TransformerLayer):
    """A layer that normalises what it adds to the residual, or takes its own of several rotary angles.

    Args:
        post_norm: Class of the norms of attention's and the MLP's output (`post_self_attn_layernorm`,
            `post_mlp_layernorm`); None where there are none.
        angles: Which of the angles of the forward pass each layer of the model takes, where there
            are several (`rope.PositionedRotaryEmbedding`); None where there are not.
    """

    def __init__(
        self,
        config: Any,
        submodules: Any,
        *,
        post_norm: type | None = None,
        angles: tuple[int, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, **kwargs)
        if post_norm is not None:
            for name, part in (("self_attn", self.self_attention), ("mlp", self.mlp)):
                norm = post_norm(config, config.hidden_size, eps=config.layernorm_epsilon)
                self.add_module(f"post_{name}_layernorm", norm)
                part.register_forward_hook(functools.partial(_normalised, norm))
        if angles is not None:
            own = functools.partial(_with_own_angles, angles[self.layer_number - 1])
            self.self_attention.register_forward_pre_hook(own, with_kwargs=True)


def _normalised(norm: Any, _: Any, __: Any, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, None]:
    values, bias = output
    return norm(values if bias is None else values + bias), None


def _with_own_angles(angle: int, _: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "rotary_pos_emb": kwargs["rotary_pos_emb"][angle]}


class ParallelResidualLayer(TransformerLayer):
    """x + attention(norm(x)) + mlp(norm'(x)): both read the layer's input (GPT-NeoX, arXiv 2204.06745)."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """As Megatron's: the layer's output [S, B, H] and the context that it was given."""
        own = ("rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin", "attention_bias", "packed_seq_params")
        attention, attention_bias = self.self_attention(
            self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            **{name: kwargs[name] for name in own if name in kwargs},
        )
        mlp, mlp_bias = self.mlp(self.pre_mlp_layernorm(hidden_states))
        output = hidden_states + attention + mlp
        for bias in (attention_bias, mlp_bias):
            output = output if bias is None else output + bias
        return output, kwargs.get("context")
