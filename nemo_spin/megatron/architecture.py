"""What a decoder looks like, as far as Megatron must know it; read from a checkpoint's configuration.

Plain values only: the bridge fills it from `config.json`, the provider builds from it,
and neither torch nor transformers is needed to hold one.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RopeScaling:
    """Rotary position embedding and the way it is stretched to longer contexts.

    Attributes:
        theta: Base of the frequencies.
        kind: default | linear | llama3 | yarn; anything else was refused on reading.
        factor: How many times longer than the original the context is.
        low_freq_factor, high_freq_factor: llama3: rotations in the original context below
            which a channel is divided, and above which it is kept.
        original_max_position_embeddings: llama3, yarn: context of the first training, tokens.
        attention_factor: yarn: what cos and sin are multiplied by; resolved (never None)
            where the kind is yarn.
        beta_fast, beta_slow: yarn: rotations at the ends of its ramp.
        partial_rotary_factor: Share of a head's channels that are rotated.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    partial_rotary_factor: float = 1.0


@dataclass(frozen=True)
class Architecture:
    """One decoder-only language model.

    Attributes:
        family: Table of the bridge that moves its weights (`bridge/families`).
        hf_architecture: Entry of `architectures` in config.json.
        num_query_groups: Key/value heads.
        head_dim: Channels of a head; `num_attention_heads * head_dim` may differ from `hidden_size`.
        vocab_size: Rows of the embedding as stored, without padding.
        max_position_embeddings: Longest context the model promises, tokens.
        gated: The MLP is `down(act(gate(x)) * up(x))`.
        qkv_bias, attention_output_bias, mlp_bias: Which linear layers have a bias.
        qk_norm: Queries and keys are normalised per head.
        tie_word_embeddings: The output layer is the embedding.
        sliding_window: Tokens a position attends to, itself included, in some layer; None where every
            layer attends to all before it within `max_position_embeddings`.
        bos_token_id: None where the model has none.
        eos_token_ids: All ids that end a response, the configuration's first.
        torch_dtype: Type of the stored weights as config.json spells it; None where it does not say.
    """

    family: str
    hf_architecture: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    rope: RopeScaling = field(default_factory=RopeScaling)
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    torch_dtype: str | None = None
