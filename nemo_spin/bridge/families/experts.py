"""Rows of tables for layers with experts, and how config.json describes them."""

from __future__ import annotations

from collections.abc import Mapping as Values
from typing import Any

from nemo_spin.bridge.families.table import read_one_rope
from nemo_spin.bridge.hf_values import count, flag, refuse
from nemo_spin.bridge.mappings import ColumnParallel, Mapping, Replicated, RowParallel
from nemo_spin.megatron.architecture import Architecture

MLP = "decoder.layers.{layer}.mlp"


def expert_rows(hf: str, *, gate: str, up: str, down: str) -> tuple[Mapping, ...]:
    """Every expert's gated MLP; `hf` is the stored name of the layer's experts."""
    one, stored = f"{MLP}.experts.local_experts.{{expert}}", f"{hf}.{{expert}}"
    return (
        ColumnParallel(
            f"{one}.linear_fc1.weight",
            (f"{stored}.{gate}.weight", f"{stored}.{up}.weight"),
            ("expert_ffn_hidden_size", "hidden_size"),
        ),
        RowParallel(
            f"{one}.linear_fc2.weight", f"{stored}.{down}.weight", ("hidden_size", "expert_ffn_hidden_size")
        ),
    )


def router_row(hf: str) -> Replicated:
    """The layer that chooses the experts; `hf` is its stored name."""
    return Replicated(f"{MLP}.router.weight", f"{hf}.weight", ("num_experts", "hidden_size"))


def read_experts(values: Values[str, Any], architecture: Architecture) -> dict[str, Any]:
    """What the families with experts say beyond what all say.

    Raises:
        CheckpointError: A value is wrong, or some layers have experts and others have none.
    """
    every = values.get("decoder_sparse_step", 1)
    if every != 1 or values.get("mlp_only_layers"):
        key = "mlp_only_layers" if every == 1 else "decoder_sparse_step"
        raise refuse(key, values.get(key), "every layer has experts")
    num_experts, chosen = count(values, "num_experts"), count(values, "num_experts_per_tok")
    if chosen > num_experts:
        raise refuse("num_experts_per_tok", chosen, f"at most num_experts, which is {num_experts}")
    return {
        **read_one_rope(values, architecture),
        "num_experts": num_experts,
        "experts_per_token": chosen,
        "expert_ffn_hidden_size": count(values, "moe_intermediate_size"),
        # one expert's weight, made to sum to 1, would be 1 whatever the router says
        "renormalised_routing": flag(values, "norm_topk_prob"),
    }
