"""How long each stage of an iteration takes, and how the sampler is best laid out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from nemo_spin.megatron.costs import (
    START_S,
    Sampler,
    SamplerMemory,
    checkpoint_bytes,
    checkpoint_seconds,
    export_seconds,
    generation_seconds,
    load_seconds,
    parameter_count,
    sampler_memory,
    step_time,
)
from nemo_spin.megatron.sizes import ModelShape
from nemo_spin.selfplay.planning.layouts import Candidate
from nemo_spin.selfplay.planning.request import Request

_SCORE_UNITS = 64  # per data-parallel rank and call (selfplay/ranks/score.py)


@dataclass(frozen=True)
class SamplerPlan:
    """Replicas of the sampler, what a GPU of one holds, and how long it takes."""

    sampler: Sampler
    replicas: int
    memory: SamplerMemory
    answers: int  # in flight in each replica
    seconds: float


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one iteration, start-up and files included; score and train with `spin.history`."""

    generate: float
    score: float
    train: float
    export: float
    steps: int  # optimizer steps inside `train`
    checkpoints: float  # seconds inside `train`

    @property
    def total(self) -> float:
        """One after the other."""
        return self.generate + self.score + self.train + self.export


@dataclass(frozen=True)
class FilesLeft:
    """Bytes that an iteration leaves; while a checkpoint is saved there is one more of them."""

    model: float
    checkpoint: float
    checkpoints: int

    @property
    def total(self) -> float:
        """All of it."""
        return self.model + self.checkpoints * self.checkpoint


def samplers(shape: ModelShape, request: Request) -> list[SamplerPlan]:
    """Every way to sample, the fastest first; empty where the model fits on no GPUs of a node.

    Args:
        shape: The model.
        request: The cluster, the work, and what is pinned.
    """
    cluster, given = request.cluster, request.config.generation
    plans = []
    for tensor in range(1, cluster.gpus_per_node + 1):
        groups = shape.num_query_groups
        whole = max(groups, tensor) % min(groups, tensor) == 0
        if cluster.gpus_per_node % tensor or shape.num_attention_heads % tensor or not whole:
            continue
        if "generation.tensor_parallel_size" in request.pinned and tensor != given.tensor_parallel_size:
            continue
        most = cluster.world_size // tensor
        replicas = given.replicas if "generation.replicas" in request.pinned else most
        sampler = Sampler(tensor, given.max_num_seqs, request.max_tokens)
        memory = sampler_memory(shape, sampler, request.numerics, cluster.device)
        if replicas > most or not memory.answers(sampler):
            continue
        seconds = generation_seconds(
            shape,
            sampler,
            request.work,
            request.numerics,
            cluster,
            answers=request.pairs,
            replicas=replicas,
        )
        seconds += START_S["generate"] + load_seconds(shape, request.numerics)
        plans.append(SamplerPlan(sampler, replicas, memory, memory.answers(sampler), seconds))
    return sorted(plans, key=lambda plan: (float(f"{plan.seconds:.3g}"), plan.sampler.tensor))


def stage_times(shape: ModelShape, chosen: Candidate, request: Request, sampling: SamplerPlan) -> StageTimes:
    """Of one iteration with this layout."""
    config, numerics, cluster, layout = request.config, request.numerics, request.cluster, chosen.layout
    units = math.ceil(request.pairs / chosen.work.num_generations) * (1 + config.spin.history)
    steps = math.ceil(units * request.epochs / chosen.work.global_batch_size)
    steps = min(steps, request.max_steps or steps)
    load = load_seconds(shape, numerics)
    interval = config.trainer.save_interval
    saves = 1 + (steps // interval if interval else 0)
    checkpoints = saves * checkpoint_seconds(shape, layout, numerics, cluster)
    call = replace(chosen.work, global_batch_size=_SCORE_UNITS * layout.data)
    scored = step_time(shape, layout, call, numerics, cluster, training=False).total
    return StageTimes(
        generate=sampling.seconds,
        score=START_S["score"] + load + units / call.global_batch_size * scored,
        train=START_S["train"] + load + steps * chosen.step.total + checkpoints,
        export=START_S["export"] + export_seconds(shape, layout, numerics, cluster),
        steps=steps,
        checkpoints=checkpoints,
    )


def files_left(shape: ModelShape, request: Request, *, steps: int) -> FilesLeft:
    """By an iteration of so many optimizer steps; answers and logs are small beside it."""
    trainer = request.config.trainer
    saved = math.ceil(steps / trainer.save_interval) if trainer.save_interval else 1
    return FilesLeft(
        model=parameter_count(shape) * request.numerics.bytes_per_number,
        checkpoint=checkpoint_bytes(shape, request.numerics),
        checkpoints=min(trainer.save_top_k, max(1, saved)),
    )
