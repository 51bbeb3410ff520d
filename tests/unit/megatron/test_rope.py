"""Rotary frequencies of every scaling variant against those of `transformers`."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nemo_spin.megatron.architecture import RopeScaling
from nemo_spin.megatron.rope import concentration_as_scaling_factor, inverse_frequencies

HEAD_DIM = 32
VARIANTS: list[tuple[RopeScaling, dict[str, Any]]] = [
    (RopeScaling(theta=5e5), {"rope_type": "default", "rope_theta": 5e5}),
    (
        RopeScaling(theta=1e4, kind="linear", factor=4.0),
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    ),
    (
        RopeScaling(
            theta=5e5,
            kind="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    (
        RopeScaling(
            theta=1e4,
            kind="yarn",
            factor=4.0,
            original_max_position_embeddings=64,
            attention_factor=1.1386294,
        ),
        {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
]


@pytest.mark.parametrize(("rope", "parameters"), VARIANTS, ids=lambda value: getattr(value, "kind", ""))
def test_frequencies_are_those_of_transformers(rope: RopeScaling, parameters: dict[str, Any]) -> None:
    config = LlamaConfig(
        hidden_size=HEAD_DIM * 2, num_attention_heads=2, head_dim=HEAD_DIM, max_position_embeddings=256
    )
    config.rope_parameters = parameters
    reference = LlamaRotaryEmbedding(config)
    torch.testing.assert_close(inverse_frequencies(rope, HEAD_DIM), reference.inv_freq, rtol=1e-5, atol=1e-9)
    scaling = concentration_as_scaling_factor(rope)
    if scaling is not None:
        concentration = 0.1 * torch.tensor(scaling).log().item() + 1.0  # as Megatron derives it
        assert concentration == pytest.approx(reference.attention_scaling, rel=1e-6)
