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
        kind: default | linear | llama3 | yarn | longrope; anything else was refused on reading.
        factor: How many times longer than the original the context is.
        low_freq_factor, high_freq_factor: llama3: rotations in the original context below
            which a channel is divided, and above which it is kept.
        original_max_position_embeddings: llama3, yarn, longrope: context of the first training, tokens.
        attention_factor: yarn, longrope: what cos and sin are multiplied by; resolved (never
            None) where the kind is one of them.
        beta_fast, beta_slow: yarn: rotations at the ends of its ramp.
        partial_rotary_factor: Share of a head's channels that are rotated, the first ones.
        short_factors: longrope: divisor of each frequency within the original context. Beyond
            it others hold; see `Architecture.longest_sequence`.
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
    short_factors: tuple[float, ...] = ()

    def rotated_channels(self, head_dim: int) -> int:
        """How many of a head's channels are rotated."""
        return int(head_dim * self.partial_rotary_factor)


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
        activation: silu | gelu | gelu_tanh | relu.
        gated: The MLP is `down(act(gate(x)) * up(x))`.
        normalization: rms | layer; the latter subtracts the mean and has a bias.
        zero_centered_norms: Norms multiply by 1 + weight.
        pre_norms, post_norms: Norms before attention and MLP, and of what they add to the residual.
        parallel_residual: Attention and MLP both read a layer's input.
        qkv_bias, attention_output_bias, mlp_bias: Which linear layers have a bias.
        qk_norm: Queries and keys are normalised, per head.
        whole_qk_norm: They are normalised over all heads together.
        softmax_scale: Multiplies attention scores; None: 1 / sqrt(head_dim).
        attention_logit_cap: Scores s become cap * tanh(s / cap); None: they do not.
        logit_cap: The same for the model's logits.
        embedding_scale: Multiplies embeddings; None: it does not.
        learned_positions: Positions are a table of `max_position_embeddings` rows, not rotations.
        num_experts: Experts of every layer; 0: one dense MLP of `ffn_hidden_size`.
        experts_per_token: How many of them a token passes through.
        expert_ffn_hidden_size: Width of one expert.
        shared_expert_ffn_hidden_size: Width of an expert that every token passes, behind a gate;
            0 where there is none.
        renormalised_routing: The weights of a token's experts are made to sum to 1.
        tie_word_embeddings: The output layer is the embedding.
        rope: Rotations; of no effect with learned positions.
        windowed_rope: Rotations of the layers with a window, where they are others.
        windows: For each layer the tokens a position attends to, itself included, or None for
            all before it; empty where no layer has a window.
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
    normalization: str = "rms"
    zero_centered_norms: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    parallel_residual: bool = False
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    whole_qk_norm: bool = False
    softmax_scale: float | None = None
    attention_logit_cap: float | None = None
    logit_cap: float | None = None
    embedding_scale: float | None = None
    learned_positions: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    expert_ffn_hidden_size: int = 0
    shared_expert_ffn_hidden_size: int = 0
    renormalised_routing: bool = False
    tie_word_embeddings: bool = False
    rope: RopeScaling = field(default_factory=RopeScaling)
    windowed_rope: RopeScaling | None = None
    windows: tuple[int | None, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    torch_dtype: str | None = None

    @property
    def query_size(self) -> int:
        """Channels of all query heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Channels of all key heads, or of all value heads."""
        return self.num_query_groups * self.head_dim

    @property
    def query_key_value_size(self) -> int:
        """Channels of all heads."""
        return self.query_size + 2 * self.key_size

    @property
    def longest_sequence(self) -> tuple[int, str] | None:
        """Tokens beyond which the model cannot be computed here, and why; None: no such limit."""
        if self.learned_positions:
            return self.max_position_embeddings, "it has learned that many positions"
        if self.rope.kind == "longrope":
            return self.rope.original_max_position_embeddings, (
                "longer ones turn every position by other angles (longrope's long_factor)"
            )
        return None

    @property
    def without_transformer_engine(self) -> str | None:
        """The property for which layers are Megatron's local ones even where Transformer Engine is there."""
        properties = {
            "norms after attention and MLP": self.post_norms,
            "attention and MLP side by side": self.parallel_residual,
            "norms over all heads together": self.whole_qk_norm,
            "norms that subtract the mean": self.normalization != "rms",
            "two rotary embeddings": self.windowed_rope is not None,
            "biases outside query, key and value": self.attention_output_bias or self.mlp_bias,
        }
        return next((name for name, has_it in properties.items() if has_it), None)
