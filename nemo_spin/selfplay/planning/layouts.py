"""Every way to split a model over a cluster, what each needs, and how fast a step is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from nemo_spin.config.mistakes import Mistake
from nemo_spin.config.pipeline_rules import layers_of_stages
from nemo_spin.config.schema import Config, ModelConfig
from nemo_spin.config.validate import find_mistakes
from nemo_spin.megatron.costs import Memory, StepTime, step_time, training_memory, usable_bytes
from nemo_spin.megatron.sizes import ModelShape, ParallelLayout, Work
from nemo_spin.selfplay.planning.request import Request

_MAX_CONTEXT = 8
_MAX_EXPERT = 64
_VIRTUAL = (1, 2, 4)
_SHRINK = (2, 4)  # of the configured microbatch
_RECOMPUTE = {"none": None, "selective": "selective", "full": "full"}


@dataclass(frozen=True)
class Candidate:
    """One layout and what it costs.

    Attributes:
        layout: The split.
        work: With the size of microbatches that goes with it.
        stage: Pipeline stage whose ranks hold most.
        memory: Of those ranks.
        step: Of one global batch.
        fits: Whether they hold it.
    """

    layout: ParallelLayout
    work: Work
    stage: int
    memory: Memory
    step: StepTime
    fits: bool


@dataclass(frozen=True)
class Search:
    """What a search over all layouts found.

    Attributes:
        fitting: The fastest first; ties: the simplest.
        tried: How many there are that divide the model and the cluster.
        smallest: Bytes of the one that needs least; 0 where none was tried.
    """

    fitting: tuple[Candidate, ...]
    tried: int
    smallest: float


def search(shape: ModelShape, request: Request) -> Search:
    """Looks at every layout."""
    usable = usable_bytes(request.cluster.device)
    found, tried, smallest = [], 0, math.inf
    works = _works(request)
    for layout in _layouts(shape, request):
        for work in works:
            _, memory = _most_held(shape, layout, work, request)
            tried += 1
            smallest = min(smallest, memory.total)
            if memory.total <= usable:
                found.append(evaluate(shape, layout, work, request))
    return Search(tuple(sorted(found, key=_rank)), tried, smallest if tried else 0.0)


def anything_fits(shape: ModelShape, request: Request) -> bool:
    """Whether `search` would find something."""
    usable = usable_bytes(request.cluster.device)
    return any(
        _most_held(shape, layout, work, request)[1].total <= usable
        for layout in _layouts(shape, request)
        for work in _works(request)
    )


def _most_held(shape: ModelShape, layout: ParallelLayout, work: Work, request: Request) -> tuple[int, Memory]:
    """The stage whose ranks hold most, an end or the first between them, and what they hold."""
    held = {
        stage: training_memory(shape, layout, work, request.numerics, stage=stage)
        for stage in sorted({0, 1 if layout.layers and layout.pipeline > 2 else 0, layout.pipeline - 1})
    }
    worst = max(held, key=lambda stage: held[stage].total)
    return worst, held[worst]


def _works(request: Request) -> list[Work]:
    """The configured size of microbatches, and smaller ones that hold a unit of mean length."""
    work = request.work
    if work.packing == "none" or "model.micro_batch_tokens" in request.pinned:
        return [work]
    sizes = [work.micro_batch_tokens // shrink for shrink in _SHRINK]
    smaller = [replace(work, micro_batch_tokens=size) for size in sizes if size >= work.unit_tokens]
    return [work, *smaller]


def evaluate(shape: ModelShape, layout: ParallelLayout, work: Work, request: Request) -> Candidate:
    """What `layout` costs."""
    stage, memory = _most_held(shape, layout, work, request)
    return Candidate(
        layout=layout,
        work=work,
        stage=stage,
        memory=memory,
        step=step_time(shape, layout, work, request.numerics, request.cluster),
        fits=memory.total <= usable_bytes(request.cluster.device),
    )


def _rank(candidate: Candidate) -> tuple[Any, ...]:
    layout = candidate.layout
    return (
        float(f"{candidate.step.total:.3g}"),
        layout.virtual,
        layout.context * layout.expert,
        layout.recompute != "none",
        candidate.memory.total,
        -candidate.work.micro_batch_tokens,
    )


def configured(shape: ModelShape, request: Request) -> ParallelLayout | None:
    """The layout that the configuration asks for; None where it divides the model or cluster not."""
    model = request.config.model
    tensor, context = model.tensor_model_parallel_size, model.context_parallel_size
    pipeline, virtual = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size or 1
    replica = tensor * pipeline * context
    spread = _spread(shape, request, pipeline, virtual)
    if request.cluster.world_size % replica or not _divides(shape, request, tensor) or spread is None:
        return None
    data = request.cluster.world_size // replica
    sharded, needs_shards = model.use_distributed_optimizer, data * context > 1 or model.optimizer_cpu_offload
    return ParallelLayout(
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        data=data,
        virtual=virtual,
        sequence_parallel=model.sequence_parallel,
        recompute=model.recompute_granularity or "none",
        distributed_optimizer=needs_shards if sharded is None else sharded,
        layers=spread,
        **_recomputation(model, model.recompute_granularity),
    )


def _recomputation(model: ModelConfig, granularity: str | None) -> dict[str, Any]:
    """What the configuration says about recomputation of this kind."""
    if granularity == "selective":
        return {"recompute_modules": tuple(model.recompute_modules)}
    if granularity == "full":
        return {
            "recompute_method": model.recompute_method,
            "recompute_num_layers": model.recompute_num_layers,
        }
    return {}


def _spread(shape: ModelShape, request: Request, pipeline: int, virtual: int) -> tuple[int, ...] | None:
    """Layers of each stage where the configuration wants uneven ones, else nothing; None: do not fit."""
    chunks = virtual if virtual > 1 else None
    model = replace(
        request.config.model,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=chunks,
    )
    layers = layers_of_stages(model, shape.num_layers)
    return () if layers and len(set(layers)) == 1 else layers


def _divides(shape: ModelShape, request: Request, tensor: int) -> bool:
    counts = (
        request.cluster.gpus_per_node,
        shape.num_attention_heads,
        shape.num_query_groups,
        shape.ffn_hidden_size,
    )
    return not any(number % tensor for number in counts)


def _layouts(shape: ModelShape, request: Request) -> Iterator[ParallelLayout]:
    world = request.cluster.world_size
    tensors = [size for size in _divisors(request.cluster.gpus_per_node) if _divides(shape, request, size)]
    for pipeline, virtual in product(_divisors(world), _VIRTUAL):
        spread = _spread(shape, request, pipeline, virtual)
        if spread is None:
            continue
        for tensor, context in product(tensors, _powers(_MAX_CONTEXT)):
            replica = tensor * pipeline * context
            if world % replica:
                continue
            if virtual > 1 and pipeline == 1:
                continue
            data = world // replica
            sharded = (True, False) if data * context > 1 else (False,)
            if request.numerics.offloaded:  # Megatron offloads the distributed optimizer's state alone
                sharded = (True,)
            for expert, recompute, shard, sequence in product(
                _expert_sizes(shape, world // pipeline), _RECOMPUTE, sharded, {tensor > 1, False}
            ):
                layout = ParallelLayout(
                    tensor=tensor,
                    pipeline=pipeline,
                    context=context,
                    data=data,
                    expert=expert,
                    virtual=virtual,
                    sequence_parallel=sequence,
                    recompute=recompute,
                    distributed_optimizer=shard,
                    layers=spread,
                    **_recomputation(request.config.model, _RECOMPUTE[recompute]),
                )
                if _keeps_to(layout, request):
                    yield layout


def _expert_sizes(shape: ModelShape, ranks: int) -> list[int]:
    if not shape.num_moe_layers:
        return [1]
    return [size for size in _divisors(shape.num_experts) if ranks % size == 0 and size <= _MAX_EXPERT]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _powers(limit: int) -> list[int]:
    return [2**power for power in range(limit.bit_length())]


def settings(layout: ParallelLayout, work: Work) -> dict[str, Any]:
    """The keys of `model` that give this layout and size of microbatches."""
    return {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual if layout.virtual > 1 else None,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
        "sequence_parallel": layout.sequence_parallel,
        "recompute_granularity": _RECOMPUTE[layout.recompute],
        "use_distributed_optimizer": layout.distributed_optimizer,
        "micro_batch_tokens": work.micro_batch_tokens,
    }


def _keeps_to(layout: ParallelLayout, request: Request) -> bool:
    """Whether it has every value that the command line gave; sequence parallelism follows TP otherwise."""
    if "model.sequence_parallel" not in request.pinned and layout.sequence_parallel != (layout.tensor > 1):
        return False
    given = request.config.model
    return all(
        getattr(given, name) in (value, None if name == "use_distributed_optimizer" else value)
        for name, value in settings(layout, request.work).items()
        if f"model.{name}" in request.pinned
    )


def with_candidate(request: Request, candidate: Candidate) -> Config:
    """The configuration with this layout on this cluster."""
    config, cluster = request.config, request.cluster
    return replace(
        config,
        model=replace(config.model, **settings(candidate.layout, candidate.work)),
        trainer=replace(config.trainer, devices=cluster.gpus_per_node, num_nodes=cluster.nodes),
    )


def refusals(request: Request, candidate: Candidate) -> list[Mistake]:
    """Why a run with this candidate is refused today, the number of nodes and the sampler apart."""
    apart = {"trainer.num_nodes", "generation.replicas", "generation.tensor_parallel_size"}
    mistakes = find_mistakes(with_candidate(request, candidate), command=None)
    return [entry for entry in mistakes if entry.keys[0] not in apart]
