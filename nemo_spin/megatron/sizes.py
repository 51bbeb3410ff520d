"""What a plan is about: a model's sizes, GPUs, how ranks split the work, and the work itself.

Plain numbers; `megatron/costs.py` turns them into bytes and seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nemo_spin.megatron.architecture import Architecture

GPU_VOCABULARY_MULTIPLE = 128  # rows of the vocabulary per rank (megatron/provider.py)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder that costs depend on; experts as in Mixtral and Qwen's mixtures.

    Attributes:
        gated, swiglu: Whether the MLP has a gate, and whether that is a SiLU.
        num_moe_layers: Layers with experts; the others have a dense MLP of width `ffn_hidden_size`.
        num_experts, experts_per_token: 0 for a dense model.
        moe_ffn_hidden_size: Width of one expert.
        shared_ffn_hidden_size: Width of the expert that every token passes; 0 where there is none.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    gated: bool = True
    swiglu: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    num_moe_layers: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    moe_ffn_hidden_size: int = 0
    shared_ffn_hidden_size: int = 0

    @property
    def query_size(self) -> int:
        """N D."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """G D: channels of the keys, and of the values."""
        return self.num_query_groups * self.head_dim

    @property
    def fc1_rows(self) -> int:
        """Rows of the first MLP matrix for each of its columns of output: gate and up, or up alone."""
        return 2 if self.gated else 1


def shape_of(architecture: Architecture) -> ModelShape:
    """The shape of a model; where it has experts, every layer does."""
    return ModelShape(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        head_dim=architecture.head_dim,
        vocab_size=architecture.vocab_size,
        gated=architecture.gated,
        swiglu=architecture.gated and architecture.activation == "silu",
        qkv_bias=architecture.qkv_bias,
        qk_norm=architecture.qk_norm,
        tie_word_embeddings=architecture.tie_word_embeddings,
        num_moe_layers=architecture.num_layers if architecture.num_experts else 0,
        num_experts=architecture.num_experts,
        experts_per_token=architecture.experts_per_token,
        moe_ffn_hidden_size=architecture.expert_ffn_hidden_size,
        shared_ffn_hidden_size=architecture.shared_expert_ffn_hidden_size,
    )


@dataclass(frozen=True)
class Device:
    """A GPU and what connects it: memory in GiB, rates one way in GB/s (10^9 bytes)."""

    name: str
    memory_gib: float
    tflops: float  # dense bf16 matrix units, 10^12/s
    memory_gb_s: float
    link_gb_s: float  # to the other GPUs of its node
    network_gb_s: float  # its share of the node's network


# Nominal rates without sparsity, from NVIDIA's data sheets of each GPU; memory is what CUDA reports,
# which is a little less than what is printed on the box. Network: DGX A100 has one 200 Gb/s adapter for
# each GPU, DGX H100, H200 and B200 one of 400 Gb/s; the L40S has PCIe 4 x16 and, by assumption, 100 Gb/s.
DEVICES = {
    device.name: device
    for device in (
        Device("A100-40", 39.4, 312.0, 1555.0, 300.0, 25.0),
        Device("A100-80", 79.1, 312.0, 2039.0, 300.0, 25.0),
        Device("H100", 79.1, 989.0, 3350.0, 450.0, 50.0),
        Device("H200", 139.8, 989.0, 4800.0, 450.0, 50.0),
        Device("B200", 178.0, 2250.0, 7700.0, 900.0, 50.0),
        Device("L40S", 44.4, 362.0, 864.0, 25.0, 12.5),
    )
}


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal GPUs."""

    nodes: int
    gpus_per_node: int
    device: Device

    @property
    def world_size(self) -> int:
        """Ranks: one for each GPU."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class ParallelLayout:
    """How a model is split.

    Attributes:
        layers: Of each pipeline stage; empty where all have as many.
        recompute: none | selective | full.
        recompute_modules: selective: of a layer's core_attn and mlp, what is computed again.
        recompute_method: full: uniform (all layers, some at a time) | block (the first of each chunk).
        recompute_num_layers: How many these are.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    expert: int = 1
    virtual: int = 1
    sequence_parallel: bool = False
    recompute: str = "none"
    distributed_optimizer: bool = False
    layers: tuple[int, ...] = ()
    recompute_modules: tuple[str, ...] = ("core_attn",)
    recompute_method: str = "uniform"
    recompute_num_layers: int = 1

    def stage_layers(self, num_layers: int) -> tuple[float, ...]:
        """Layers of each stage, of a model of `num_layers`."""
        return self.layers or (num_layers / self.pipeline,) * self.pipeline

    def recomputes(self, part: str) -> bool:
        """Whether `part` of a layer is computed again, the layer's input apart."""
        return self.recompute == "selective" and part in self.recompute_modules

    def layers_again(self, layers: float) -> float:
        """Of a stage's `layers`, those that are computed again as a whole."""
        if self.recompute != "full":
            return 0.0
        return layers if self.recompute_method == "uniform" else min(self._block, layers)

    @property
    def _block(self) -> float:
        return float(self.recompute_num_layers * self.virtual)

    @property
    def expert_data(self) -> int:
        """Replicas of an expert: Megatron's expert-tensor size is 1 here, so its ranks hold whole experts."""
        return self.tensor * self.context * self.data // self.expert


@dataclass(frozen=True)
class Numerics:
    """Bytes of a parameter and of an activation, and the optimizer.

    `offloaded` is the share of main weights and optimizer state that the host's memory holds.
    """

    bytes_per_number: int = 2  # bf16; 4: float32
    optimizer: str = "rmsprop"
    vocabulary_multiple: int = GPU_VOCABULARY_MULTIPLE
    offloaded: float = 0.0
    lora_rank: int | None = None  # null: all weights are trained
    lora_targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Work:
    """Units of self-play: a prompt, its real response and `num_generations` generated ones.

    Attributes:
        prompt, real, generated: Mean tokens of each; what time depends on.
        longest_unit: Tokens of the longest unit as it is packed; what memory depends on.
        micro_batch_tokens: Most positions of a microbatch, unless one unit has more.
        packing: shared_prompt | pairs | none.
        padded_row: Without packing: positions of each response's padded row.
        micro_batch_size: Without packing: units of a microbatch.
        global_batch_size: Units of an optimizer step.
    """

    prompt: float
    real: float
    generated: float
    longest_unit: int
    micro_batch_tokens: int
    num_generations: int = 1
    packing: str = "shared_prompt"
    padded_row: int = 0
    micro_batch_size: int = 1
    global_batch_size: int = 64

    @property
    def responses(self) -> int:
        """Of a unit."""
        return 1 + self.num_generations

    @property
    def response_tokens(self) -> float:
        """Predicted tokens of a unit."""
        return self.real + self.num_generations * self.generated

    @property
    def unit_tokens(self) -> float:
        """Positions that are computed for a unit of mean lengths."""
        if self.packing == "none":
            return float(self.responses * self.padded_row)
        prompts = 1 if self.packing == "shared_prompt" else self.responses
        return prompts * self.prompt + self.response_tokens

    @property
    def slots(self) -> float:
        """Positions of the largest microbatch."""
        if self.packing == "none":
            return self.micro_batch_size * self.unit_tokens
        return float(max(self.micro_batch_tokens, self.longest_unit))

    def microbatches(self, data: int) -> int:
        """Of a step, on the data-parallel rank that has most; units are never split."""
        units = math.ceil(self.global_batch_size / data)
        if self.packing == "none":
            return math.ceil(units / self.micro_batch_size)
        return math.ceil(units / max(1, int(self.micro_batch_tokens / self.unit_tokens)))

    @property
    def attended(self) -> float:
        """Pairs of a query and a key it sees, of one unit: what attention's FLOPs are proportional to.

        A causal run of n queries has n^2/2 of them; a run after a prompt of m keys n m more.
        """
        runs = [self.real] + [self.generated] * self.num_generations
        if self.packing == "shared_prompt":
            return self.prompt**2 / 2 + sum(run * self.prompt + run**2 / 2 for run in runs)
        if self.packing == "pairs":
            return sum((self.prompt + run) ** 2 / 2 for run in runs)
        return self.responses * self.padded_row**2 / 2
