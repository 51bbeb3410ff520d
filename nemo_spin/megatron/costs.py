"""What a model costs: bytes per rank and seconds per stage. Every formula and constant of `nemo-spin plan`.

One file, though a long one: the formulae share their terms and are checked together, the
parameters, gradients, main weights and optimizer state against a real Megatron model byte for
byte, the activations and the FLOPs against what a real forward pass keeps and multiplies
(`tests/distributed/megatron/test_costs.py`), the rest against numbers worked out by hand.

Sources. [M] Narayanan et al., arXiv 2104.04473: FLOPs (eq. 3), pipeline bubble (section 2.2), what
tensor parallelism communicates (section 3.2). [K] Korthikanti et al., arXiv 2205.05198: activations
per layer (section 4), pipelines (section 4.2.3), sequence parallelism, recomputation (section 5).
[D] Dao et al., arXiv 2205.14135: attention that keeps no scores. What is an assumption of ours says so.

No torch: a plan answers at once. Legend: L layers, h hidden size, f MLP width, V vocabulary (padded),
D head size, N query heads, G key/value heads, E experts, k experts of a token; t, p, c, d, e tensor-,
pipeline-, context-, data- and expert-parallel sizes; s token positions of a microbatch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from nemo_spin.megatron.sizes import Cluster, Device, ModelShape, Numerics, ParallelLayout, Work

GIB = 2**30
_MAIN = 4  # bytes of a gradient, a main weight and each number of optimizer state: all float32
_OPTIMIZER_NUMBERS = {"adam": 2, "rmsprop": 1}  # moments kept for each weight
_BUCKET_ALIGNMENT = 64  # Megatron's distributed optimizer starts each parameter at such a multiple
_LOGITS_PER_BLOCK = 1 << 24  # of megatron/vocab_parallel.py, whose value a test compares
_LOGIT_BYTES = 8  # a block's logits in float32, and what a product in another type adds

# Assumptions of ours; the first measured run on a cluster should replace them.
RESERVED_GIB = 3.0  # CUDA context, NCCL's buffers, workspaces of libraries
USABLE_SHARE = 0.95  # of the rest; the allocator loses some to fragments
MATMUL_EFFICIENCY = 0.6  # of peak, elementwise kernels between included; [K] reports 0.54 to 0.57 overall
ATTENTION_EFFICIENCY = 0.35  # of peak: fused attention over segments of some hundred tokens
FLOAT32_SHARE = 1 / 15  # of the bf16 peak without TF32, PyTorch's default: 67 of 989, 19.5 of 312 TFLOP/s
LAUNCH_S = 2e-4  # to start the kernels of a layer's forward pass, and of each repetition; shorter it never is
LINK_EFFICIENCY = 0.8  # of the nominal rate of NVLink and of the network
MEMORY_EFFICIENCY = 0.7  # of the nominal rate of the GPU's memory
SAMPLER_MEMORY_SHARE = 0.9  # vLLM's gpu_memory_utilization
SAMPLER_WORKSPACE_GIB = 3.0  # its activations and CUDA graphs
SAMPLER_STEP_S = 3e-3  # scheduling and sampling of one token for all answers in flight
ALL_REDUCE_LATENCY_S = 1.5e-5  # of a small all-reduce inside a node
STORAGE_READ, STORAGE_WRITE = 2e9, 1e9  # bytes/s of a node on shared storage
HASH_RATE = 1.5e9  # bytes/s of sha256 on one core
START_S = {"generate": 90.0, "score": 60.0, "train": 90.0, "export": 60.0}  # imports, graphs, rendezvous

# ---- parameters ----


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights: those of experts are shared out and reduced over other ranks than the rest."""

    dense: float = 0.0
    expert: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.dense + self.expert


def padded_vocab_size(vocab_size: int, *, tensor: int, multiple: int) -> int:
    """Rows of the vocabulary in all ranks together (as `provider.padded_vocab_size`)."""
    return math.ceil(vocab_size / (tensor * multiple)) * tensor * multiple


def attention_parameters(shape: ModelShape, tensor: int = 1) -> float:
    """Of one layer, its two norms included, on each tensor-parallel rank."""
    h, rows = shape.hidden_size, shape.query_size + 2 * shape.key_size
    matrices = h * rows + h * shape.query_size + (rows if shape.qkv_bias else 0)
    return matrices / tensor + 2 * h + (2 * shape.head_dim if shape.qk_norm else 0)


def mlp_parameters(shape: ModelShape, width: int) -> float:
    """Of one MLP of `width`: h f for each of gate and up, and f h back."""
    return (shape.fc1_rows + 1) * shape.hidden_size * width


def layer_parameters(shape: ModelShape, layout: ParallelLayout, *, moe: bool) -> Parameters:
    """Of one layer, on each rank that has it."""
    attention = attention_parameters(shape, layout.tensor)
    if not moe:
        return Parameters(attention + mlp_parameters(shape, shape.ffn_hidden_size) / layout.tensor)
    shared = mlp_parameters(shape, shape.shared_ffn_hidden_size) / layout.tensor
    router = shape.hidden_size * shape.num_experts
    experts = shape.num_experts / layout.expert * mlp_parameters(shape, shape.moe_ffn_hidden_size)
    return Parameters(attention + shared + router, experts)


def stage_parameters(
    shape: ModelShape, layout: ParallelLayout, numerics: Numerics, *, stage: int
) -> Parameters:
    """Of a rank of pipeline stage `stage`: its share of the layers, experts spread evenly over them.

    The first stage has the embedding, the last one the last norm and the output layer, which is a
    copy of the embedding where they are tied (and none where one stage has both).
    """
    share = layout.stage_layers(shape.num_layers)[stage] / shape.num_layers
    dense = layer_parameters(shape, layout, moe=False).total * (shape.num_layers - shape.num_moe_layers)
    moe = layer_parameters(shape, layout, moe=True) if shape.num_moe_layers else Parameters()
    vocabulary = padded_vocab_size(
        shape.vocab_size, tensor=layout.tensor, multiple=numerics.vocabulary_multiple
    )
    matrix = vocabulary / layout.tensor * shape.hidden_size
    ends = matrix if stage == 0 else 0.0
    if stage == layout.pipeline - 1:
        one_matrix = shape.tie_word_embeddings and layout.pipeline == 1
        ends += shape.hidden_size + (0.0 if one_matrix else matrix)
    return Parameters(
        dense=share * (dense + moe.dense * shape.num_moe_layers) + ends,
        expert=share * moe.expert * shape.num_moe_layers,
    )


def adapter_parameters(shape: ModelShape, layout: ParallelLayout, numerics: Numerics, *, stage: int) -> float:
    """Of the low-rank adapters of a rank of stage `stage`: A [r, in] and B [out, r] of each projection.

    What a projection splits over tensor-parallel ranks is split, the other factor is whole on each.
    """
    if numerics.lora_rank is None:
        return 0.0
    t, h, f = layout.tensor, shape.hidden_size, shape.ffn_hidden_size
    widths = {
        "q_proj": h + shape.query_size / t,
        "k_proj": h + shape.key_size / t,
        "v_proj": h + shape.key_size / t,
        "o_proj": shape.query_size / t + h,
        "gate_proj": h + f / t,
        "up_proj": h + f / t,
        "down_proj": f / t + h,
    }
    width = sum(widths[name] for name in numerics.lora_targets if shape.gated or name != "gate_proj")
    return layout.stage_layers(shape.num_layers)[stage] * numerics.lora_rank * width


def trained_parameters(
    shape: ModelShape, layout: ParallelLayout, numerics: Numerics, *, stage: int
) -> Parameters:
    """Of a rank of pipeline stage `stage`: all of its weights, or its adapters."""
    if numerics.lora_rank is None:
        return stage_parameters(shape, layout, numerics, stage=stage)
    return Parameters(adapter_parameters(shape, layout, numerics, stage=stage))


def parameter_count(shape: ModelShape) -> int:
    """Of the checkpoint: no padding, tied matrices once."""
    whole = Numerics(vocabulary_multiple=1)
    return round(stage_parameters(shape, ParallelLayout(), whole, stage=0).total)


def active_parameter_count(shape: ModelShape) -> int:
    """Those that one token passes: of the experts, `experts_per_token` of each layer."""
    idle = shape.num_experts - shape.experts_per_token
    experts = shape.num_moe_layers * idle * mlp_parameters(shape, shape.moe_ffn_hidden_size)
    return parameter_count(shape) - round(experts)


# ---- memory ----


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank by part, at the moment of a step when most is held."""

    parameters: float = 0.0
    gradients: float = 0.0
    main_weights: float = 0.0
    optimizer_state: float = 0.0
    activations: float = 0.0
    head_and_loss: float = 0.0
    temporaries: float = 0.0

    @property
    def total(self) -> float:
        """All parts."""
        return sum(vars(self).values())


def usable_bytes(device: Device) -> float:
    """What the parts of a rank may take together."""
    return (device.memory_gib - RESERVED_GIB) * GIB * USABLE_SHARE


def training_memory(
    shape: ModelShape, layout: ParallelLayout, work: Work, numerics: Numerics, *, stage: int
) -> Memory:
    """Of a rank of pipeline stage `stage` in training.

    Weights as they are multiplied; gradients in float32 whatever the weights (Megatron's
    data-parallel buffer); float32 main weights under bf16; one number of state under RMSProp, two
    under Adam. The distributed optimizer spreads the last two over the d c replicas of a weight.
    With low-rank adapters all but the weights is of the adapters alone; activations are counted
    as without them, though a frozen linear without an adapter keeps no input.
    """
    held, on_gpu = stage_parameters(shape, layout, numerics, stage=stage), 1 - numerics.offloaded
    adapters = adapter_parameters(shape, layout, numerics, stage=stage)
    trained = trained_parameters(shape, layout, numerics, stage=stage)
    shards = layout.data * layout.context if layout.distributed_optimizer else 1
    expert_shards = layout.expert_data if layout.distributed_optimizer else 1
    owned = trained.dense / shards + trained.expert / expert_shards
    in_flight = microbatches_in_flight(layout, work, stage)
    per_microbatch, again = _stage_activation_bytes(shape, layout, work, numerics, stage=stage)
    kept = in_flight * per_microbatch + again
    return Memory(
        parameters=(held.total + adapters) * numerics.bytes_per_number,
        gradients=trained.total * _MAIN,
        main_weights=owned * on_gpu * _MAIN if numerics.bytes_per_number < _MAIN else 0.0,
        optimizer_state=owned * on_gpu * _MAIN * _OPTIMIZER_NUMBERS[numerics.optimizer],
        activations=kept,
        head_and_loss=head_bytes(shape, layout, work, numerics) if stage == layout.pipeline - 1 else 0.0,
        temporaries=_backward_temporaries(shape, layout, work, numerics),
    )


def _stage_activation_bytes(
    shape: ModelShape, layout: ParallelLayout, work: Work, numerics: Numerics, *, stage: int
) -> tuple[float, float]:
    """What the layers of a stage keep of one microbatch, and what is there while some is computed again.

    Of layers that are one group the first one's input is kept. What is computed again is there in
    full for a while ([K] section 5): a part of a layer, or one group of layers, by which time
    those that are not computed again have had their backward pass.
    """
    layers = layout.stage_layers(shape.num_layers)[stage]
    whole = layer_activation_bytes(shape, layout, work, numerics, recompute="none")
    angles = 2 * shape.head_dim * numerics.bytes_per_number * work.slots / layout.context
    if layout.recompute == "none":
        return layers * whole + angles, 0.0
    kept = layer_activation_bytes(shape, layout, work, numerics)
    if layout.recompute == "selective":
        parts = layout.recompute_modules
        alone = [replace(layout, recompute_modules=(part,)) for part in parts] if len(parts) > 1 else []
        least = min((layer_activation_bytes(shape, part, work, numerics) for part in alone), default=kept)
        return layers * kept + angles, whole - least
    again = layout.layers_again(layers)
    together = layout.recompute_num_layers if layout.recompute_method == "uniform" else 1
    inputs = again / together
    return inputs * kept + (layers - again) * whole, max(0.0, min(together, again) - (layers - again)) * whole


def offloaded_bytes(
    shape: ModelShape, layout: ParallelLayout, work: Work, numerics: Numerics, *, stage: int
) -> float:
    """What a rank in training takes of the host's memory: offloaded main weights, state and gradients."""
    whole = training_memory(shape, layout, work, replace(numerics, offloaded=0.0), stage=stage)
    return numerics.offloaded * (2 * whole.main_weights + whole.optimizer_state)


def scoring_memory(
    shape: ModelShape, layout: ParallelLayout, work: Work, numerics: Numerics, *, stage: int
) -> Memory:
    """Of a rank that only runs forward: weights, two layers' worth of activations, the head."""
    held = stage_parameters(shape, layout, numerics, stage=stage)
    last = stage == layout.pipeline - 1
    block = _block_logits(shape, layout, work, numerics) * _LOGIT_BYTES
    chosen = work.slots / layout.context * shape.hidden_size * numerics.bytes_per_number * 3
    return Memory(
        parameters=held.total * numerics.bytes_per_number,
        activations=layer_activation_bytes(shape, layout, work, numerics, recompute="none"),
        head_and_loss=block + chosen if last else 0.0,
    )


def scheduled_microbatches(layout: ParallelLayout, work: Work) -> int:
    """Of a step and rank; interleaved schedules take whole groups of p (`engine.py` fills them up)."""
    m = work.microbatches(layout.data)
    return m if layout.virtual == 1 else math.ceil(m / layout.pipeline) * layout.pipeline


def microbatches_in_flight(layout: ParallelLayout, work: Work, stage: int) -> float:
    """Microbatches whose activations a stage holds when it holds most ([K] section 4.2.3).

    One forward, one backward: the first stage holds p, the last one. Interleaved, with v chunks of
    1/v of the stage's layers: 2 (p - stage - 1) + (v - 1) p + 1 chunks.
    """
    p, v, m = layout.pipeline, layout.virtual, scheduled_microbatches(layout, work)
    if v == 1:
        return float(min(p - stage, m))
    return min(2 * (p - stage - 1) + (v - 1) * p + 1, m * v) / v


def layer_activation_bytes(
    shape: ModelShape,
    layout: ParallelLayout,
    work: Work,
    numerics: Numerics,
    *,
    recompute: str | None = None,
) -> float:
    """What the forward pass of one layer keeps for its backward pass, of one microbatch.

    Counted as in [K] section 4.1, for the layers of `provider.py`: no dropout, RMSNorm, rotary
    embeddings, a gated MLP, and attention that keeps its inputs, its output and one normaliser for
    each query and head instead of scores [D]. `none` keeps, in numbers of each token:

        norms       2 x (input, normalised output)
        attention   (2 N + 3 G) D / t: rotated queries and keys, and the projection that the values
                    are a view of; 2 N D / t: the output, and the copy that is projected (one
                    without packing)
        MLP         3 f / t: gate, up and their product; 5 f / t with another gate than SwiGLU, and
                    in experts: up once more, to which Megatron adds its offset of 0, and act(gate)

    All layers share sines and cosines, which are not counted here. (Megatron's own rotation, which
    local layers on a GPU have, keeps 4 D more.)

    Packed responses have the prompt's keys and values copied before their own, and a mask.
    Under context parallelism attention keeps the gathered keys and values, 2 G D c / t, in place
    of its own. `selective` does without attention's output, normalisers, copies, mask and what
    was gathered, or without the MLP's numbers; `full` keeps the layer's input only. Sequence
    parallelism divides by t what tensor parallelism does not.
    """
    recompute = recompute or layout.recompute
    a, t, h = numerics.bytes_per_number, layout.tensor, shape.hidden_size
    tokens = work.slots / layout.context
    own_tokens = tokens / (t if layout.sequence_parallel else 1)
    if recompute == "full":
        return own_tokens * h * a
    kept = own_tokens * 2 * 2 * a * h
    if shape.qk_norm:
        kept += tokens * (shape.query_size + shape.key_size) / t * a
    attends_again = recompute == "selective" and "core_attn" in layout.recompute_modules
    keeps_gathered = layout.context > 1 and not attends_again
    own = 2 * shape.query_size + 3 * shape.key_size
    gathered = shape.query_size + 2 * shape.key_size * layout.context
    kept += tokens * a * (gathered if keeps_gathered else own) / t
    kept += tokens * a * shape.query_size / t
    if not attends_again:
        if work.packing != "none":
            kept += tokens * a * shape.query_size / t
        kept += tokens * _MAIN * shape.num_attention_heads / t
        kept += _prefix_bytes(shape, layout, work, numerics)
    share = shape.num_moe_layers / shape.num_layers
    mlp = 0 if recompute == "selective" and "mlp" in layout.recompute_modules else _mlp_numbers(shape)
    return (
        kept
        + share * _moe_bytes(shape, layout, numerics, tokens=tokens, own_tokens=own_tokens)
        + (1 - share) * tokens * a * mlp * shape.ffn_hidden_size / t
    )


def _mlp_numbers(shape: ModelShape, *, experts: bool = False) -> int:
    if shape.gated and shape.swiglu and not experts:
        return 3
    return 5 if shape.gated else 2


def _moe_bytes(
    shape: ModelShape, layout: ParallelLayout, numerics: Numerics, *, tokens: float, own_tokens: float
) -> float:
    """Experts of a rank take k of its own tokens' copies, on average: balanced routing is assumed."""
    numbers = _mlp_numbers(shape, experts=True)
    routed = shape.experts_per_token * (numbers * shape.moe_ffn_hidden_size + 2 * shape.hidden_size)
    shared = numbers * shape.shared_ffn_hidden_size / layout.tensor
    return numerics.bytes_per_number * (own_tokens * routed + tokens * shared) + own_tokens * _MAIN * (
        2 * shape.num_experts
    )


def _prefix_bytes(shape: ModelShape, layout: ParallelLayout, work: Work, numerics: Numerics) -> float:
    """Copies of the prompt's keys and values before each response, and the mask of each."""
    if work.packing != "shared_prompt":
        return 0.0
    units = work.slots / work.unit_tokens
    runs = [work.real] + [work.generated] * work.num_generations
    keys = sum(work.prompt + run for run in runs) * 2 * shape.key_size / layout.tensor
    masks = sum(run * (work.prompt + run) for run in runs)
    return units * (keys * numerics.bytes_per_number + masks) / layout.context


def _block_logits(shape: ModelShape, layout: ParallelLayout, work: Work, numerics: Numerics) -> float:
    vocabulary = padded_vocab_size(
        shape.vocab_size, tensor=layout.tensor, multiple=numerics.vocabulary_multiple
    )
    return min(_LOGITS_PER_BLOCK, vocabulary / layout.tensor * work.slots / layout.context)


def head_bytes(shape: ModelShape, layout: ParallelLayout, work: Work, numerics: Numerics) -> float:
    """The last norm, the chosen hidden states, their gradient and a block of logits.

    Logits exist for a block at a time, in float32. At most every position predicts a token.
    The gradient of the hidden states is summed in float32; that of the output weight has no
    bytes here, because it is added to the buffer that `gradients` counts.
    """
    a, h = numerics.bytes_per_number, shape.hidden_size
    kept = head_activation_bytes(shape, layout, work, numerics, predicting=work.slots)
    passing = work.slots / layout.context * h * (_MAIN + a * (2 if layout.sequence_parallel else 1))
    return kept + passing + _block_logits(shape, layout, work, numerics) * _LOGIT_BYTES


def head_activation_bytes(
    shape: ModelShape, layout: ParallelLayout, work: Work, numerics: Numerics, *, predicting: float
) -> float:
    """Kept for the backward pass: the last norm's input, and the states of `predicting` positions."""
    a, h = numerics.bytes_per_number, shape.hidden_size
    own = work.slots / layout.context / (layout.tensor if layout.sequence_parallel else 1)
    return own * a * h + predicting / layout.context * h * a


def _backward_temporaries(shape: ModelShape, layout: ParallelLayout, work: Work, numerics: Numerics) -> float:
    """The gradient of the largest matrix before it is added to the float32 ones; those inside an MLP."""
    a, t = numerics.bytes_per_number, layout.tensor
    tokens = work.slots / layout.context
    width = shape.ffn_hidden_size / t
    if shape.num_moe_layers:
        width = max(width, shape.experts_per_token * shape.moe_ffn_hidden_size)
    weight = shape.fc1_rows * shape.hidden_size * shape.ffn_hidden_size / t
    if numerics.lora_rank is not None:  # frozen, without gradient
        weight = 0.0
    return a * (weight + tokens * (3 * width + 2 * shape.hidden_size))


# ---- floating-point operations ----


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a forward pass; a product of m x k by k x n has 2 m k n."""

    layers: float  # matrix products of all layers
    attention: float
    head: float

    @property
    def total(self) -> float:
        """Of the forward pass."""
        return self.layers + self.attention + self.head

    @property
    def training(self) -> float:
        """Needed by a step: the backward pass has two products for each of the forward pass [M]."""
        return 3 * self.total

    @property
    def training_adapters(self) -> float:
        """Needed by a step of low-rank adapters: frozen weights have no product for their gradient.

        The adapters' own products, r (in + out) in place of in out, are left out.
        """
        return 2 * self.layers + 3 * self.attention + 2 * self.head


def layer_matmul_parameters(shape: ModelShape) -> float:
    """Weights that a token is multiplied with in all layers (norms and biases are not)."""
    rows = shape.query_size + 2 * shape.key_size
    attention = shape.num_layers * shape.hidden_size * (rows + shape.query_size)
    dense = (shape.num_layers - shape.num_moe_layers) * mlp_parameters(shape, shape.ffn_hidden_size)
    experts = shape.experts_per_token * mlp_parameters(shape, shape.moe_ffn_hidden_size)
    shared = mlp_parameters(shape, shape.shared_ffn_hidden_size)
    return (
        attention + dense + shape.num_moe_layers * (experts + shared + shape.hidden_size * shape.num_experts)
    )


def unit_flops(shape: ModelShape, work: Work) -> Flops:
    """Of the forward pass of one unit of mean lengths, needed work only.

    As [M] eq. 3, with two differences: causal attention counts the scores that are seen (half of
    them), and the vocabulary is met by response tokens only.
    """
    return Flops(
        layers=2 * layer_matmul_parameters(shape) * work.unit_tokens,
        attention=4 * shape.query_size * shape.num_layers * work.attended,
        head=2 * shape.hidden_size * shape.vocab_size * work.response_tokens,
    )


# ---- time of a training or scoring step ----


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of a global batch, by cause."""

    compute: float
    tensor: float  # all-reduces of activations
    context: float  # keys and values between context-parallel ranks
    expert: float  # tokens to their experts and back
    pipeline: float  # activations between stages
    bubble: float  # stages that wait
    data: float  # gradients, and weights of the distributed optimizer
    optimizer: float

    @property
    def total(self) -> float:
        """Nothing overlaps, as nothing is configured to."""
        return sum(vars(self).values())


def ring_seconds(size: float, ranks: int, rate: float) -> float:
    """A ring all-reduce of `size` bytes moves 2 (n-1)/n of them through every rank."""
    return 2 * (ranks - 1) / ranks * size / rate if ranks > 1 else 0.0


def step_time(
    shape: ModelShape,
    layout: ParallelLayout,
    work: Work,
    numerics: Numerics,
    cluster: Cluster,
    *,
    training: bool = True,
) -> StepTime:
    """Of one global batch on its slowest ranks, without overlap of any two causes."""
    m = scheduled_microbatches(layout, work)
    # of a microbatch, on the rank that has most; ranks without a unit wait for it
    units = math.ceil(work.global_batch_size / layout.data) / work.microbatches(layout.data)
    compute = _microbatch_compute(shape, layout, work, numerics, cluster, units=units, training=training)
    tokens = units * work.unit_tokens / layout.context
    layers = max(layout.stage_layers(shape.num_layers))
    again = layout.layers_again(layers) / layers
    passes = 2 + again + layout.recomputes("mlp") / 2 if training else 1
    link, network = _rates(cluster)
    activations = tokens * shape.hidden_size * numerics.bytes_per_number
    # [M] section 3.2: two all-reduces of a layer forward, two backward
    tensor = layers * 2 * passes * ring_seconds(activations, layout.tensor, link)
    context = 0.0
    if layout.context > 1:
        near = layout.tensor * layout.context <= cluster.gpus_per_node
        keys = tokens * 2 * shape.key_size / layout.tensor * numerics.bytes_per_number
        # gathered forward and where attention is computed again; gradients reduced and scattered
        exchanges = 1 + training * (1 + again + layout.recomputes("core_attn"))
        context = layers * exchanges * keys * (layout.context - 1) / (link if near else network)
    expert = _expert_seconds(shape, layout, cluster, activations=activations, passes=passes)
    hop = activations / (layout.tensor if layout.sequence_parallel else 1)
    pipeline = (1 + training) * layout.virtual * hop / network if layout.pipeline > 1 else 0.0
    per_microbatch = compute + tensor + context + expert + pipeline
    return StepTime(
        compute=m * compute,
        tensor=m * tensor,
        context=m * context,
        expert=m * expert,
        pipeline=m * pipeline,
        bubble=(layout.pipeline - 1) / layout.virtual * per_microbatch,  # [M] section 2.2
        data=_reduce_seconds(shape, layout, numerics, cluster) if training else 0.0,
        optimizer=_update_seconds(shape, layout, numerics, cluster) if training else 0.0,
    )


def _rates(cluster: Cluster) -> tuple[float, float]:
    """Bytes/s inside a node and between nodes, of one GPU."""
    device = cluster.device
    link = device.link_gb_s * 1e9 * LINK_EFFICIENCY
    return link, device.network_gb_s * 1e9 * LINK_EFFICIENCY if cluster.nodes > 1 else link


def _microbatch_compute(
    shape: ModelShape,
    layout: ParallelLayout,
    work: Work,
    numerics: Numerics,
    cluster: Cluster,
    *,
    units: float,
    training: bool,
) -> float:
    """Of the slowest stage; recomputation included. The last stage has the head."""
    forward = unit_flops(shape, work)
    rate = peak(cluster.device, numerics) * layout.tensor * layout.context
    frozen = training and numerics.lora_rank is not None  # weights without a product for their gradient
    head = (4 - frozen if training else 1) * forward.head / MATMUL_EFFICIENCY  # logits are formed twice
    *others, last = layout.stage_layers(shape.num_layers)
    slowest = 0.0
    for layers, after in {*((layers, 0.0) for layers in others), (last, head)}:
        products, attention = _repetitions(shape, layout, layers) if training else (1.0, 1.0)
        products -= frozen
        seconds = after + layers / shape.num_layers * (
            products * forward.layers / MATMUL_EFFICIENCY
            + attention * forward.attention / ATTENTION_EFFICIENCY
        )
        slowest = max(slowest, units * seconds / rate, LAUNCH_S * products * layers)
    return slowest


def _repetitions(shape: ModelShape, layout: ParallelLayout, layers: float) -> tuple[float, float]:
    """Passes over the products and the attention of a stage's layers: three, and what is computed again."""
    again = layout.layers_again(layers) / layers if layers else 0.0
    share = 0.0
    if layout.recomputes("mlp"):
        mlp = (shape.num_layers - shape.num_moe_layers) * mlp_parameters(shape, shape.ffn_hidden_size)
        share = mlp / layer_matmul_parameters(shape)
    return 3.0 + again + share, 3.0 + again + layout.recomputes("core_attn")


def peak(device: Device, numerics: Numerics) -> float:
    """Floating-point operations per second of a GPU at this precision."""
    share = 1.0 if numerics.bytes_per_number == 2 else FLOAT32_SHARE
    return device.tflops * 1e12 * share


def _expert_seconds(
    shape: ModelShape, layout: ParallelLayout, cluster: Cluster, *, activations: float, passes: float
) -> float:
    """Two all-to-alls of k copies of each token, of every layer with experts and pass."""
    if layout.expert == 1 or not shape.num_moe_layers:
        return 0.0
    link, network = _rates(cluster)
    rate = link if layout.expert <= cluster.gpus_per_node else network
    own = activations / layout.tensor * shape.experts_per_token
    layers = shape.num_moe_layers / layout.pipeline
    return layers * 2 * passes * own * (layout.expert - 1) / layout.expert / rate


def _reduce_seconds(shape: ModelShape, layout: ParallelLayout, numerics: Numerics, cluster: Cluster) -> float:
    """Float32 gradients over the replicas of the first stage; sharded, weights come back in their type."""
    link, network = _rates(cluster)
    replicas = layout.data * layout.context
    held = trained_parameters(shape, layout, numerics, stage=0)
    factor = (_MAIN + numerics.bytes_per_number) / 2 if layout.distributed_optimizer else _MAIN
    inside = max(1, cluster.gpus_per_node // layout.tensor)  # replicas of a weight in one node
    near = layout.tensor * replicas <= cluster.gpus_per_node
    rate = link if near else min(link, network * min(inside, replicas))
    expert_near = layout.expert * layout.expert_data <= cluster.gpus_per_node
    expert_inside = max(1, cluster.gpus_per_node // layout.expert)
    expert_rate = link if expert_near else min(link, network * min(expert_inside, layout.expert_data))
    return ring_seconds(held.dense * factor, replicas, rate) + ring_seconds(
        held.expert * factor, layout.expert_data, expert_rate
    )


def _update_seconds(shape: ModelShape, layout: ParallelLayout, numerics: Numerics, cluster: Cluster) -> float:
    """Every number of the update is read once and, gradients apart, written once."""
    memory = training_memory_of_weights(shape, layout, numerics)
    written = trained_parameters(shape, layout, numerics, stage=0).total * numerics.bytes_per_number
    moved = memory.gradients + 2 * (memory.main_weights + memory.optimizer_state) + written
    return moved / (cluster.device.memory_gb_s * 1e9 * MEMORY_EFFICIENCY)


def training_memory_of_weights(shape: ModelShape, layout: ParallelLayout, numerics: Numerics) -> Memory:
    """The parts of the first stage that depend on weights only."""
    nothing = Work(prompt=0.0, real=1.0, generated=0.0, longest_unit=1, micro_batch_tokens=1)
    return training_memory(shape, layout, nothing, numerics, stage=0)


# ---- time of whole stages ----


@dataclass(frozen=True)
class Sampler:
    """One replica of the sampler: how many GPUs it spans and how much it holds at once.

    Attributes:
        tensor: Its tensor-parallel size.
        max_num_seqs: Answers it draws at the same time, at most.
        max_tokens: Tokens of the longest prompt and its answer.
    """

    tensor: int
    max_num_seqs: int
    max_tokens: int


@dataclass(frozen=True)
class SamplerMemory:
    """Bytes of a GPU of the sampler; `room` is what is left for keys and values."""

    weights: float
    workspace: float
    room: float
    cache_per_token: float

    def answers(self, sampler: Sampler) -> int:
        """That fit at once with the longest prompt and answer; 0: the model does not fit."""
        return max(0, min(sampler.max_num_seqs, int(self.room / (self.cache_per_token * sampler.max_tokens))))


def sampler_memory(shape: ModelShape, sampler: Sampler, numerics: Numerics, device: Device) -> SamplerMemory:
    """Weights over all its GPUs; keys and values of every layer, whole heads on each GPU."""
    a = numerics.bytes_per_number
    weights = parameter_count(shape) * a / sampler.tensor
    workspace = SAMPLER_WORKSPACE_GIB * GIB
    groups = math.ceil(shape.num_query_groups / sampler.tensor)
    return SamplerMemory(
        weights=weights,
        workspace=workspace,
        room=device.memory_gib * GIB * SAMPLER_MEMORY_SHARE - weights - workspace,
        cache_per_token=2 * shape.num_layers * groups * shape.head_dim * a,
    )


def generation_seconds(
    shape: ModelShape,
    sampler: Sampler,
    work: Work,
    numerics: Numerics,
    cluster: Cluster,
    *,
    answers: float,
    replicas: int,
) -> float:
    """To draw `answers`, each prompt read once for all of its answers.

    A decoding step reads the weights (of experts: those that the answers in flight hit) and the
    keys and values of all answers in flight, or is bound by its products where that is longer.
    """
    memory = sampler_memory(shape, sampler, numerics, cluster.device)
    mine = math.ceil(answers / replicas)
    at_once = max(1, min(memory.answers(sampler), mine))
    a = numerics.bytes_per_number
    flops = peak(cluster.device, numerics) * sampler.tensor * MATMUL_EFFICIENCY
    rate = cluster.device.memory_gb_s * 1e9 * MEMORY_EFFICIENCY
    per_token = 2 * (layer_matmul_parameters(shape) + shape.hidden_size * shape.vocab_size)
    read = (parameter_count(shape) - _experts_not_hit(shape, at_once)) * a / sampler.tensor
    context = work.prompt + work.generated / 2
    step = max((read + at_once * context * memory.cache_per_token) / rate, at_once * per_token / flops)
    if sampler.tensor > 1:
        link, _ = _rates(cluster)
        size = at_once * shape.hidden_size * a
        step += 2 * shape.num_layers * (ALL_REDUCE_LATENCY_S + ring_seconds(size, sampler.tensor, link))
    prompts = mine / work.num_generations * work.prompt * 2 * layer_matmul_parameters(shape) / flops
    return mine / at_once * work.generated * (step + SAMPLER_STEP_S) + prompts


def _experts_not_hit(shape: ModelShape, tokens: int) -> float:
    """Weights of experts that none of `tokens` tokens goes to, if each chooses k of E by chance."""
    if not shape.num_experts:
        return 0.0
    missed = (1 - shape.experts_per_token / shape.num_experts) ** tokens
    return (
        missed * shape.num_moe_layers * shape.num_experts * mlp_parameters(shape, shape.moe_ffn_hidden_size)
    )


def load_seconds(shape: ModelShape, numerics: Numerics) -> float:
    """To read a checkpoint from shared storage; every node reads all of it at the same time."""
    return parameter_count(shape) * numerics.bytes_per_number / STORAGE_READ


def export_seconds(shape: ModelShape, layout: ParallelLayout, numerics: Numerics, cluster: Cluster) -> float:
    """The nodes of one replica write their shares and read them back; one core hashes all of it."""
    size = parameter_count(shape) * numerics.bytes_per_number
    writers = min(cluster.nodes, math.ceil(layout.tensor * layout.pipeline / cluster.gpus_per_node))
    return size / writers * (1 / STORAGE_WRITE + 1 / STORAGE_READ) + size / HASH_RATE


def checkpoint_bytes(shape: ModelShape, numerics: Numerics) -> float:
    """Of a resume checkpoint: trained weights, main weights and optimizer state."""
    kept = numerics.bytes_per_number + _MAIN * _OPTIMIZER_NUMBERS[numerics.optimizer]
    if numerics.bytes_per_number < _MAIN:
        kept += _MAIN
    saved = trained_parameters(shape, ParallelLayout(), replace(numerics, vocabulary_multiple=1), stage=0)
    return saved.total * kept


def checkpoint_seconds(
    shape: ModelShape, layout: ParallelLayout, numerics: Numerics, cluster: Cluster
) -> float:
    """To save what a resume checkpoint holds; sharded states from all nodes."""
    replica = math.ceil(layout.tensor * layout.pipeline * layout.expert / cluster.gpus_per_node)
    writers = cluster.nodes if layout.distributed_optimizer else min(cluster.nodes, replica)
    return checkpoint_bytes(shape, numerics) / writers / STORAGE_WRITE
