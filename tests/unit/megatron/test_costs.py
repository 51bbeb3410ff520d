"""Formulae against published parameter counts and numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nemo_spin.megatron import costs
from nemo_spin.megatron.costs import (
    GIB,
    LINK_EFFICIENCY,
    Sampler,
    active_parameter_count,
    generation_seconds,
    layer_activation_bytes,
    microbatches_in_flight,
    offloaded_bytes,
    parameter_count,
    ring_seconds,
    sampler_memory,
    stage_parameters,
    step_time,
    training_memory,
    unit_flops,
)
from nemo_spin.megatron.sizes import DEVICES, Cluster, ModelShape, Numerics, ParallelLayout, Work

# From each model's config.json
LLAMA_2_7B = ModelShape(32, 4096, 11008, 32, 32, 128, 32000)
LLAMA_2_70B = ModelShape(80, 8192, 28672, 64, 8, 128, 32000)
LLAMA_3_8B = ModelShape(32, 4096, 14336, 32, 8, 128, 128256)
QWEN3_8B = ModelShape(36, 4096, 12288, 32, 8, 128, 151936, qk_norm=True)
QWEN2_5_0_5B = ModelShape(24, 896, 4864, 14, 2, 64, 151936, qkv_bias=True, tie_word_embeddings=True)
MIXTRAL_8X7B = replace(
    ModelShape(32, 4096, 14336, 32, 8, 128, 32000),
    num_moe_layers=32,
    num_experts=8,
    experts_per_token=2,
    moe_ffn_hidden_size=14336,
)
WORK = Work(prompt=100, real=200, generated=300, longest_unit=600, micro_batch_tokens=600)
BF16 = Numerics(optimizer="adam", vocabulary_multiple=1)
H100 = DEVICES["H100"]


@pytest.mark.parametrize(
    ("shape", "published"),
    [
        (LLAMA_2_7B, 6_738_415_616),
        (LLAMA_2_70B, 68_976_648_192),
        (LLAMA_3_8B, 8_030_261_248),
        (QWEN3_8B, 8_190_735_360),
        (QWEN2_5_0_5B, 494_032_768),
        (MIXTRAL_8X7B, 46_702_792_704),
    ],
)
def test_parameters_are_those_of_the_published_checkpoints(shape: ModelShape, published: int) -> None:
    assert parameter_count(shape) == published


def test_a_token_of_a_mixture_passes_the_experts_it_chose() -> None:
    # six of eight experts idle in each layer: 46,702,792,704 - 32 * 6 * 3 * 4096 * 14336
    assert active_parameter_count(MIXTRAL_8X7B) == 12_879_925_248
    assert active_parameter_count(LLAMA_3_8B) == parameter_count(LLAMA_3_8B)


def test_constants_are_those_of_the_code() -> None:
    from nemo_spin.megatron import provider, vocab_parallel
    from nemo_spin.megatron.sizes import GPU_VOCABULARY_MULTIPLE

    assert costs._LOGITS_PER_BLOCK == vocab_parallel._LOGITS_PER_BLOCK
    assert GPU_VOCABULARY_MULTIPLE == provider._GPU_VOCABULARY_MULTIPLE


def test_bytes_of_a_weight() -> None:
    """bf16 with Adam: 2 + 4 (gradient) + 4 (main weight) + 8; float32 with RMSProp: 4 + 4 + 4."""
    number = parameter_count(LLAMA_3_8B)
    memory = training_memory(LLAMA_3_8B, ParallelLayout(), WORK, BF16, stage=0)
    weights = (memory.parameters, memory.gradients, memory.main_weights, memory.optimizer_state)
    assert weights == (2 * number, 4 * number, 4 * number, 8 * number)
    plain = Numerics(bytes_per_number=4, optimizer="rmsprop", vocabulary_multiple=1)
    memory = training_memory(LLAMA_3_8B, ParallelLayout(), WORK, plain, stage=0)
    assert (memory.main_weights, memory.optimizer_state) == (0, 4 * number)
    sharded = ParallelLayout(data=8, distributed_optimizer=True)
    memory = training_memory(LLAMA_3_8B, sharded, WORK, BF16, stage=0)
    assert memory.gradients == 4 * number
    assert memory.main_weights + memory.optimizer_state == 12 * number / 8


def test_what_is_offloaded_moves_to_the_host() -> None:
    """Of 12 bytes of main weight and Adam a quarter; in the host's memory with 4 of a gradient."""
    number, one = parameter_count(LLAMA_3_8B), ParallelLayout()
    some = replace(BF16, offloaded=0.25)
    memory = training_memory(LLAMA_3_8B, one, WORK, some, stage=0)
    assert (memory.main_weights, memory.optimizer_state) == (3 * number, 6 * number)
    assert (memory.parameters, memory.gradients) == (2 * number, 4 * number)
    assert offloaded_bytes(LLAMA_3_8B, one, WORK, some, stage=0) == (1 + 2 + 1) * number
    assert offloaded_bytes(LLAMA_3_8B, one, WORK, BF16, stage=0) == 0


def test_bytes_of_adapters() -> None:
    """Rank 16 beside all seven projections of Llama 3 8B: 41,943,040 numbers, as `peft` counts them."""
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    numerics = replace(BF16, lora_rank=16, lora_targets=targets)
    number, adapters = parameter_count(LLAMA_3_8B), 41_943_040
    full = training_memory(LLAMA_3_8B, ParallelLayout(), WORK, BF16, stage=0)
    memory = training_memory(LLAMA_3_8B, ParallelLayout(), WORK, numerics, stage=0)
    weights = (memory.parameters, memory.gradients, memory.main_weights, memory.optimizer_state)
    assert weights == (2 * (number + adapters), 4 * adapters, 4 * adapters, 8 * adapters)
    gate_and_up = 2 * 4096 * 14336  # the largest matrix; it has no gradient
    assert full.temporaries - memory.temporaries == 2 * gate_and_up
    assert (memory.activations, memory.head_and_loss) == (full.activations, full.head_and_loss)
    cluster = Cluster(1, 1, H100)
    saving = [costs.checkpoint_seconds(LLAMA_3_8B, ParallelLayout(), n, cluster) for n in (BF16, numerics)]
    assert saving[1] / saving[0] == pytest.approx(adapters / number)


def test_adapters_of_a_rank_at_2_by_4() -> None:
    """Eight layers; of q_proj B is split, of o_proj A, the other factor is whole on each rank."""
    numerics = replace(BF16, lora_rank=16, lora_targets=("q_proj", "o_proj"))
    layout = ParallelLayout(tensor=2, pipeline=4)
    expected = 8 * 16 * ((4096 + 4096 / 2) + (4096 / 2 + 4096))
    assert training_memory(LLAMA_3_8B, layout, WORK, numerics, stage=1).gradients == 4 * expected


def test_a_rank_of_70b_at_8_by_4() -> None:
    """Twenty layers, an eighth of each matrix; embedding in the first stage, norm and output in the last."""
    layout = ParallelLayout(tensor=8, pipeline=4, sequence_parallel=True)
    attention = 8192 * (8192 + 2 * 1024) + 8192 * 8192
    layer = (attention + 3 * 8192 * 28672) / 8 + 2 * 8192
    first, middle, last = (
        training_memory(LLAMA_2_70B, layout, WORK, BF16, stage=stage).parameters for stage in (0, 1, 3)
    )
    assert middle == 2 * 20 * layer
    assert first == middle + 2 * 32000 / 8 * 8192
    assert last == first + 2 * 8192


def test_experts_are_shared_out_over_expert_ranks_only() -> None:
    layout = ParallelLayout(data=8, expert=4, distributed_optimizer=True)
    memory = training_memory(MIXTRAL_8X7B, layout, WORK, BF16, stage=0)
    experts = 32 * 8 * 3 * 4096 * 14336
    dense = 46_702_792_704 - experts
    assert memory.parameters == 2 * (dense + experts / 4)
    # a dense weight has 8 replicas, an expert's 8 / 4
    assert memory.main_weights == 4 * (dense / 8 + experts / 4 / 2)


def test_activations_of_a_layer_by_hand() -> None:
    """bf16, Transformer Engine, pairs: 2 bytes of 4 h, 2 N D + 3 G D, 2 N D, 3 f; 4 N of normalisers."""
    work = replace(WORK, packing="pairs", micro_batch_tokens=1000)
    numbers = 4 * 4096 + (2 * 4096 + 3 * 1024) + 2 * 4096 + 3 * 14336
    per_token = 2 * numbers + 4 * 32
    assert layer_activation_bytes(LLAMA_3_8B, ParallelLayout(), work, BF16) == 1000 * per_token
    full = ParallelLayout(recompute="full")
    assert layer_activation_bytes(LLAMA_3_8B, full, work, BF16) == 1000 * 2 * 4096  # [K] section 5: 2 s b h
    split = ParallelLayout(tensor=4, sequence_parallel=True)
    expected = 1000 * per_token / 4
    assert layer_activation_bytes(LLAMA_3_8B, split, work, BF16) == pytest.approx(expected)
    without = ParallelLayout(tensor=4)
    norms = 1000 * 2 * 4 * 4096
    assert layer_activation_bytes(LLAMA_3_8B, without, work, BF16) == pytest.approx(expected + norms * 3 / 4)
    gelu = replace(LLAMA_3_8B, swiglu=False)  # act(gate), and what Megatron adds its offset of 0 to
    assert layer_activation_bytes(gelu, ParallelLayout(), work, BF16) == 1000 * (per_token + 2 * 2 * 14336)


@pytest.mark.parametrize(
    ("stage", "virtual", "microbatches", "expected"),
    [
        (0, 1, 16, 4),
        (3, 1, 16, 1),
        (0, 1, 2, 2),
        (0, 2, 16, 11 / 2),  # 2 * 3 + 4 + 1 chunks of half a stage
        (3, 2, 16, 5 / 2),
    ],
)
def test_microbatches_in_flight(stage: int, virtual: int, microbatches: int, expected: float) -> None:
    work = replace(WORK, global_batch_size=microbatches)  # a unit of 600 tokens fills a microbatch
    assert microbatches_in_flight(ParallelLayout(pipeline=4, virtual=virtual), work, stage) == expected


def test_flops_are_those_of_the_paper_where_it_counts_the_same() -> None:
    """[M] eq. 3 is 96 B s l h^2 (1 + s/6h + V/16lh): four forward passes of the layers, three of the head.

    There f = 4 h without gate, attention counts all scores, and all tokens are predicted.
    """
    layers, h, v, s = 24, 1024, 51200, 512
    shape = ModelShape(layers, h, 4 * h, 16, 16, 64, v, gated=False)
    work = Work(prompt=0, real=s, generated=0, longest_unit=s, micro_batch_tokens=s)
    flops = unit_flops(shape, work)
    paper = 96 * s * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h))
    assert 4 * (flops.layers + 2 * flops.attention) + 3 * flops.head == pytest.approx(paper)


def test_a_shared_prompt_is_computed_once() -> None:
    shared = unit_flops(LLAMA_3_8B, replace(WORK, num_generations=3))
    pairs = unit_flops(LLAMA_3_8B, replace(WORK, num_generations=3, packing="pairs"))
    assert shared.layers / pairs.layers == pytest.approx((100 + 200 + 900) / (4 * 100 + 200 + 900))
    assert shared.head == pairs.head == 2 * 4096 * 128256 * (200 + 900)
    # queries and keys: the prompt 100^2/2, a response of n: 100 n + n^2/2
    attended = 5000 + (100 * 200 + 200**2 / 2) + 3 * (100 * 300 + 300**2 / 2)
    assert shared.attention == 4 * 4096 * 32 * attended


def test_a_ring_moves_nearly_everything_twice() -> None:
    assert ring_seconds(8e9, 4, 1e9) == pytest.approx(12.0)
    assert ring_seconds(8e9, 1, 1e9) == 0.0


def test_a_step_on_one_gpu_is_its_products() -> None:
    cluster = Cluster(1, 1, H100)
    work = replace(WORK, global_batch_size=8, packing="pairs", micro_batch_tokens=700)
    step = step_time(LLAMA_3_8B, ParallelLayout(), work, BF16, cluster)
    flops = unit_flops(LLAMA_3_8B, work)
    seconds = 3 * flops.layers / 0.6 + 3 * flops.attention / 0.35 + 4 * flops.head / 0.6
    assert step.compute == pytest.approx(8 * seconds / 989e12)
    assert step.tensor == step.bubble == step.pipeline == step.data == step.context == 0
    # the update reads gradients and weights, reads and writes main weights and both moments
    assert step.optimizer == pytest.approx(parameter_count(LLAMA_3_8B) * (4 + 2 * 12 + 2) / (3350e9 * 0.7))


def test_what_parallel_sizes_cost() -> None:
    cluster = Cluster(2, 8, H100)
    work = replace(WORK, global_batch_size=32)
    alone = step_time(LLAMA_3_8B, ParallelLayout(data=16), work, BF16, cluster)
    split = step_time(LLAMA_3_8B, ParallelLayout(tensor=4, data=4), work, BF16, cluster)
    # per microbatch and layer two all-reduces forward, two backward, of 600 x 4096 x 2 bytes over NVLink
    ring = 2 * 3 / 4 * 600 * 4096 * 2 / (450e9 * 0.8)
    assert split.tensor == pytest.approx(8 * 32 * 4 * ring)
    # the 8 replicas of a node use its 8 adapters together
    assert alone.data == pytest.approx(
        2 * 15 / 16 * 4 * parameter_count(LLAMA_3_8B) / (8 * 50e9 * 0.8), rel=1e-6
    )
    piped = step_time(LLAMA_3_8B, ParallelLayout(pipeline=4, data=4), work, BF16, cluster)
    assert piped.bubble == pytest.approx(3 / 8 * (piped.compute + piped.pipeline))  # (p - 1) / m
    chunked = step_time(LLAMA_3_8B, ParallelLayout(pipeline=4, data=4, virtual=2), work, BF16, cluster)
    assert chunked.bubble == pytest.approx(3 / 8 / 2 * (chunked.compute + chunked.pipeline))


def test_a_sampler_holds_weights_and_the_rest_is_for_keys_and_values() -> None:
    sampler = Sampler(tensor=1, max_num_seqs=256, max_tokens=2048)
    memory = sampler_memory(LLAMA_3_8B, sampler, BF16, H100)
    assert memory.weights == 2 * 8_030_261_248
    assert memory.cache_per_token == 2 * 32 * 1024 * 2  # 128 KiB
    room = 79.1 * GIB * 0.9 - memory.weights - 3 * GIB
    assert memory.answers(sampler) == int(room / (2048 * 131072)) == 212
    assert sampler_memory(LLAMA_2_70B, sampler, BF16, H100).answers(sampler) == 0


def test_sampling_is_bound_by_memory_then_by_products() -> None:
    cluster = Cluster(1, 1, H100)
    work = replace(WORK, prompt=1, generated=100)

    def per_token(at_once: int) -> float:
        sampler = Sampler(1, at_once, 101)
        return generation_seconds(LLAMA_3_8B, sampler, work, BF16, cluster, answers=at_once, replicas=1) / 100

    one = 2 * parameter_count(LLAMA_3_8B) / (3350e9 * 0.7) + costs.SAMPLER_STEP_S
    assert per_token(1) == pytest.approx(one, rel=0.01)  # weights are read for every token
    assert per_token(64) < 1.2 * one  # and for 64 answers hardly longer
    twice = generation_seconds(LLAMA_3_8B, Sampler(1, 64, 101), work, BF16, cluster, answers=128, replicas=2)
    assert twice == pytest.approx(100 * per_token(64))


def test_uneven_stages_have_their_own_layers() -> None:
    """The embedding's stage with two layers fewer is as much smaller as two layers are large."""
    even, uneven = ParallelLayout(pipeline=2), ParallelLayout(pipeline=2, layers=(14, 18))
    layer = (
        stage_parameters(LLAMA_3_8B, even, BF16, stage=0).total
        - stage_parameters(LLAMA_3_8B, replace(uneven, layers=(15, 17)), BF16, stage=0).total
    )
    assert layer == pytest.approx(218_112_000)  # 8B's layer: 4096 (6144 + 4096 + 3 x 14336) + 2 x 4096
    for stage, difference in enumerate((-2, 2)):
        held, equal = (
            training_memory(LLAMA_3_8B, layout, WORK, BF16, stage=stage) for layout in (uneven, even)
        )
        assert held.gradients - equal.gradients == pytest.approx(4 * difference * layer)
        assert held.activations / equal.activations == pytest.approx((16 + difference) / 16, rel=1e-4)


def test_what_is_computed_again_takes_its_time() -> None:
    cluster = Cluster(1, 8, DEVICES["H100"])
    base = ParallelLayout(data=8)

    def compute(**again: Any) -> float:
        return step_time(LLAMA_3_8B, replace(base, **again), WORK, BF16, cluster).compute

    none, full = compute(), compute(recompute="full")
    attention = compute(recompute="selective")
    mlp = compute(recompute="selective", recompute_modules=("mlp",))
    both = compute(recompute="selective", recompute_modules=("core_attn", "mlp"))
    assert both - none == pytest.approx((attention - none) + (mlp - none))
    assert none < attention < mlp < both < full
    half = compute(recompute="full", recompute_method="block", recompute_num_layers=16)
    assert half == pytest.approx((none + full) / 2)


def test_ranks_that_share_rows_exchange_keys_and_values() -> None:
    """By hand: 1,000 positions over 2 ranks, keys and values of 1,024 numbers each in bf16, 32 layers."""
    work = Work(
        prompt=200, real=400, generated=400, longest_unit=1000, micro_batch_tokens=1000, global_batch_size=1
    )
    cluster = Cluster(1, 2, DEVICES["H100"])
    layout = ParallelLayout(context=2)
    once = 500 * 2 * 1024 * 2 * 32 / (450e9 * LINK_EFFICIENCY)
    for recompute, exchanges in (("none", 2), ("selective", 3), ("full", 3)):
        step = step_time(LLAMA_3_8B, replace(layout, recompute=recompute), work, BF16, cluster)
        assert step.context == pytest.approx(exchanges * once)
    scoring = step_time(LLAMA_3_8B, layout, work, BF16, cluster, training=False)
    assert scoring.context == pytest.approx(once)
