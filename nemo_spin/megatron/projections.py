"""Which projections of a Hugging Face model a linear of Megatron's layer is made of; without torch."""

from __future__ import annotations

# By the names of `config/lora_rules.py`, in the order of the linear's outputs.
PROJECTIONS = {
    "self_attention.linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "self_attention.linear_proj": ("o_proj",),
    "mlp.linear_fc1": ("gate_proj", "up_proj"),
    "mlp.linear_fc2": ("down_proj",),
}
