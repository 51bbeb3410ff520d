"""A plan as tables for people, and as JSON for scripts."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from nemo_spin.megatron.costs import (
    GIB,
    RESERVED_GIB,
    USABLE_SHARE,
    active_parameter_count,
    parameter_count,
    unit_flops,
    usable_bytes,
)
from nemo_spin.selfplay.displays import duration
from nemo_spin.selfplay.planning.layouts import Candidate
from nemo_spin.selfplay.planning.plan import Plan

_PARTS = {
    "parameters": "parameters",
    "gradients": "gradients (float32)",
    "main_weights": "main weights (float32)",
    "optimizer_state": "optimizer state",
    "activations": "activations",
    "head_and_loss": "head and loss",
    "temporaries": "temporaries",
}


def render(plan: Plan) -> RenderableType:
    """Everything, in the order of a user's questions."""
    parts: list[RenderableType] = [
        Text(f"{_title(plan)}\n", style="bold"),
        Text(f"GiB of a rank: {layout_name(plan.chosen)}"),
        _memory_table(plan),
        _sampler_line(plan),
        Text(
            f"Layouts: {plan.num_fitting} of {plan.num_layouts} fit; the fastest, and where their time goes"
        ),
        _layout_table(plan),
        Text(_times_title(plan)),
        _time_table(plan),
        _files_line(plan),
    ]
    parts += [Text(f"  note: {note}") for note in plan.notes]
    parts.append(Text("  Times are estimates (megatron/costs.py says of what); memory is checked by tests."))
    if plan.overrides:
        lines = " \\\n".join(f"  {shlex.quote(override)}" for override in plan.overrides)
        parts += [Text("\nTo paste behind `nemo-spin run`:", style="bold"), Text(lines)]
    return Group(*parts)


def _title(plan: Plan) -> str:
    cluster, shape = plan.request.cluster, plan.model.shape
    total, active = parameter_count(shape), active_parameter_count(shape)
    of_these = f" ({_billions(active)} for a token)" if active != total else ""
    return (
        f"{plan.model.name}: {_billions(total)} parameters{of_these}, on {cluster.nodes} x "
        f"{cluster.gpus_per_node} {cluster.device.name} ({cluster.device.memory_gib:g} GiB)"
    )


def _billions(number: float) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e8 else f"{number / 1e6:.2f}M"


def layout_name(candidate: Candidate) -> str:
    """Such as `TP 8 x PP 4 x DP 2, full recomputation`."""
    layout = candidate.layout
    sizes = {"TP": layout.tensor, "PP": layout.pipeline, "CP": layout.context, "EP": layout.expert}
    named = [f"{name} {size}" for name, size in sizes.items() if size > 1] + [f"DP {layout.data}"]
    more = [f"microbatches of {candidate.work.micro_batch_tokens}"]
    more += [f"{layout.virtual} chunks"] if layout.virtual > 1 else []
    more += ["sequence parallel"] if layout.sequence_parallel else []
    more += [f"{layout.recompute} recomputation"] if layout.recompute != "none" else []
    more += ["sharded optimizer"] if layout.distributed_optimizer else []
    return ", ".join([" x ".join(named), *more])


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size < 10 * GIB else f"{size / GIB:.1f}"


def _memory_table(plan: Plan) -> Table:
    chosen, usable = plan.chosen, usable_bytes(plan.request.cluster.device)
    stage = f" (pipeline stage {chosen.stage})" if chosen.layout.pipeline > 1 else ""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column(f"train{stage}", justify="right")
    table.add_column("score", justify="right")
    for part, label in _PARTS.items():
        train, score = getattr(chosen.memory, part), getattr(plan.scoring, part)
        table.add_row(label, _gib(train) if train else "–", _gib(score) if score else "–")
    table.add_row("together", _gib(chosen.memory.total), _gib(plan.scoring.total), style="bold")
    reserved = f"{RESERVED_GIB:g} for CUDA and NCCL, {1 - USABLE_SHARE:.0%} fragments"
    table.add_row(f"can be used ({reserved})", _gib(usable), _gib(usable))
    return table


def _sampler_line(plan: Plan) -> Text:
    sampling = plan.sampling
    memory, sampler = sampling.memory, sampling.sampler
    cache = memory.cache_per_token * sampler.max_tokens
    return Text(
        f"  Sampler, {sampling.replicas} x TP {sampler.tensor}: weights {_gib(memory.weights)} GiB of a GPU, "
        f"{_gib(memory.room)} GiB for keys and values ({_gib(cache)} GiB for the longest answer of "
        f"{sampler.max_tokens} tokens): {sampling.answers} answers at once\n"
    )


def _layout_table(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in ("GiB", "s/step", "compute", "TP", "PP", "DP", "rest"):
        table.add_column(name, justify="right")
    rows = [("", candidate) for candidate in (plan.chosen, *plan.alternatives)]
    if plan.configured is not None:
        fits = "" if plan.configured.fits else ", does not fit"
        rows.append((f"as configured{fits}: ", plan.configured))
    for label, candidate in rows:
        step = candidate.step
        waiting, rest = step.pipeline + step.bubble, step.context + step.expert + step.optimizer
        shares = (step.compute, step.tensor, waiting, step.data, rest)
        table.add_row(
            label + layout_name(candidate),
            _gib(candidate.memory.total),
            f"{step.total:.3g}",
            *(f"{share / step.total:.0%}" for share in shares),
        )
    return table


def _times_title(plan: Plan) -> str:
    work, history = plan.request.work, plan.request.config.spin.history
    return (
        f"Time of an iteration: {plan.request.pairs:,} pairs"
        + (f" and as many of {history} earlier one{'s' if history > 1 else ''}" if history else "")
        + f", {plan.request.epochs} epochs; {work.prompt:.0f} prompt, {work.real:.0f} real, "
        f"{work.generated:.0f} generated tokens"
    )


def _time_table(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    plans = [plan] + ([plan.doubled] if plan.doubled else [])
    for one in plans:
        nodes = one.request.cluster.nodes
        table.add_column(f"{nodes} node{'s' if nodes > 1 else ''}", justify="right")
    for stage in ("generate", "score", "train", "export"):
        table.add_row(stage, *(duration(getattr(one.times, stage)) for one in plans))
    table.add_row("together", *(duration(one.times.total) for one in plans), style="bold")
    gpus = [f"{one.times.total / 3600 * one.request.cluster.world_size:,.0f}" for one in plans]
    table.add_row("GPU hours", *gpus)
    table.add_row("optimizer steps", *(f"{one.times.steps:,}" for one in plans))
    table.add_row("model FLOP/s of peak in a step", *(f"{utilisation(one):.0%}" for one in plans))
    table.add_row("train: GiB of a rank", *(_gib(one.chosen.memory.total) for one in plans))
    table.add_row("layout", *(layout_name(one.chosen) for one in plans))
    return table


def _files_line(plan: Plan) -> Text:
    files = plan.files
    several = f"{files.checkpoints} checkpoints" if files.checkpoints > 1 else "a checkpoint"
    return Text(
        f"  An iteration leaves {_gb(files.total)}: the model, {_gb(files.model)}, and {several} of "
        f"{_gb(files.checkpoint)}, one more while it is saved\n"
    )


def _gb(size: float) -> str:
    return f"{size / 1e12:.3g} TB" if size >= 1e12 else f"{size / 1e9:.3g} GB"


def utilisation(plan: Plan) -> float:
    """Needed floating-point operations of a step over what the GPUs could do in its time."""
    unit = unit_flops(plan.model.shape, plan.request.work)
    trained = unit.training if plan.request.numerics.lora_rank is None else unit.training_adapters
    needed = plan.request.work.global_batch_size * trained
    cluster = plan.request.cluster
    return needed / (plan.chosen.step.total * cluster.world_size * cluster.device.tflops * 1e12)


def as_json(plan: Plan) -> dict[str, Any]:
    """Plain values; bytes and seconds."""
    shape, cluster = plan.model.shape, plan.request.cluster
    return {
        "model": {
            "name": plan.model.name,
            "parameters": parameter_count(shape),
            "active_parameters": active_parameter_count(shape),
            "trainable": plan.model.architecture is not None,
        },
        "cluster": asdict(cluster),
        "pairs": plan.request.pairs,
        "layout": _candidate_json(plan.chosen),
        "usable_bytes": usable_bytes(cluster.device),
        "scoring_memory": {**asdict(plan.scoring), "total": plan.scoring.total},
        "alternatives": [_candidate_json(candidate) for candidate in plan.alternatives],
        "configured": _candidate_json(plan.configured) if plan.configured else None,
        "layouts": {"fitting": plan.num_fitting, "all": plan.num_layouts},
        "sampler": asdict(plan.sampling),
        "seconds": {**asdict(plan.times), "total": plan.times.total},
        "files": {**asdict(plan.files), "total": plan.files.total},
        "utilisation": utilisation(plan),
        "overrides": list(plan.overrides),
        "notes": list(plan.notes),
        "twice_the_nodes": as_json(plan.doubled) if plan.doubled else None,
    }


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    return {
        **asdict(candidate.layout),
        "work": asdict(candidate.work),
        "stage": candidate.stage,
        "fits": candidate.fits,
        "memory": {**asdict(candidate.memory), "total": candidate.memory.total},
        "step_seconds": {**asdict(candidate.step), "total": candidate.step.total},
    }
