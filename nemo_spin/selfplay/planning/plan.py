"""`nemo-spin plan`: what fits, what is fastest, how long it takes, and what twice the nodes change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nemo_spin.config.mistakes import Mistake
from nemo_spin.errors import ConfigError, explain
from nemo_spin.megatron.costs import (
    GIB,
    Memory,
    checkpoint_seconds,
    offloaded_bytes,
    scoring_memory,
    usable_bytes,
)
from nemo_spin.selfplay.planning.layouts import (
    Candidate,
    Search,
    anything_fits,
    configured,
    evaluate,
    refusals,
    search,
    settings,
)
from nemo_spin.selfplay.planning.model import PlannedModel
from nemo_spin.selfplay.planning.request import Request
from nemo_spin.selfplay.planning.stages import (
    FilesLeft,
    SamplerPlan,
    StageTimes,
    files_left,
    samplers,
    stage_times,
)

_SHOWN = 5
_MUCH = 0.25  # a share of time that is worth a note
_MAX_NODES = 1024


@dataclass(frozen=True)
class Plan:
    """An answer.

    Attributes:
        model: What it is about.
        request: What was asked.
        chosen: The fastest layout that fits and that a run takes today.
        scoring: Memory of the stage that scores.
        alternatives: The next fastest, none differing from another in memory measures only.
        configured: The configuration's own layout; None where it does not divide model or cluster.
        num_fitting, num_layouts: Of the layouts that divide both.
        sampling: How the opponent answers.
        times: Of the stages.
        files: What an iteration leaves on the disk.
        doubled: The same with twice the nodes.
        faster: A faster layout that is refused today, and why.
        notes: What else the user should know, one line each.
    """

    model: PlannedModel
    request: Request
    chosen: Candidate
    scoring: Memory
    alternatives: tuple[Candidate, ...]
    configured: Candidate | None
    num_fitting: int
    num_layouts: int
    sampling: SamplerPlan
    times: StageTimes
    files: FilesLeft
    doubled: Plan | None
    faster: tuple[Candidate, Mistake] | None
    notes: tuple[str, ...]

    @property
    def overrides(self) -> tuple[str, ...]:
        """What to add to the configuration; nothing for a model that cannot be trained yet."""
        if self.model.architecture is None:
            return ()
        model = settings(self.chosen.layout, self.chosen.work)
        chosen = {f"model.{name}": value for name, value in model.items()} | {
            "generation.tensor_parallel_size": self.sampling.sampler.tensor,
            "generation.replicas": self.sampling.replicas,
            "trainer.num_nodes": self.request.cluster.nodes,
            "trainer.devices": self.request.cluster.gpus_per_node,
        }
        return tuple(
            f"{key}={_spelt(value)}"
            for key, value in chosen.items()
            if value != _configured_value(self.request, key) or key in self.request.pinned
        )


def _configured_value(request: Request, key: str) -> object:
    section, _, name = key.partition(".")
    return getattr(getattr(request.config, section), name)


def _spelt(value: object) -> str:
    return "null" if value is None else str(value).lower()


def make_plan(model: PlannedModel, request: Request, *, double: bool = True) -> Plan:
    """Plans.

    Raises:
        ConfigError: Nothing fits, or nothing that divides the model and the cluster is allowed.
    """
    shape = model.shape
    found = search(shape, request)
    if not found.fitting:
        raise _nothing_fits(model, request, found)
    allowed, faster = _allowed(model, request, found.fitting)
    chosen = allowed[0]
    sampling = samplers(shape, request)
    if not sampling:
        raise _sampler_does_not_fit(request)
    own = configured(shape, request)
    times = stage_times(shape, chosen, request, sampling[0])
    plan = Plan(
        model=model,
        request=request,
        chosen=chosen,
        scoring=scoring_memory(
            shape, chosen.layout, chosen.work, request.numerics, stage=chosen.layout.pipeline - 1
        ),
        alternatives=tuple(allowed[1:]),
        configured=evaluate(shape, own, request.work, request) if own and own != chosen.layout else None,
        num_fitting=len(found.fitting),
        num_layouts=found.tried,
        sampling=sampling[0],
        times=times,
        files=files_left(shape, request, steps=times.steps),
        doubled=_doubled(model, request) if double else None,
        faster=faster,
        notes=(),
    )
    return replace(plan, notes=tuple(_notes(plan)))


def _doubled(model: PlannedModel, request: Request) -> Plan | None:
    """None where twice the nodes cannot be used, such as where a batch cannot be split over more replicas."""
    try:
        return make_plan(model, twice(request), double=False)
    except ConfigError:
        return None


def twice(request: Request) -> Request:
    """The same question with twice the nodes."""
    return replace(request, cluster=replace(request.cluster, nodes=2 * request.cluster.nodes))


def _allowed(
    model: PlannedModel, request: Request, fitting: Sequence[Candidate]
) -> tuple[list[Candidate], tuple[Candidate, Mistake] | None]:
    """The fastest ways to split that a run takes, and the first faster one that it refuses."""
    found: list[Candidate] = []
    faster, reason = None, None
    splits = set()
    for candidate in fitting:
        layout = candidate.layout
        split = (layout.tensor, layout.pipeline, layout.context, layout.data, layout.expert, layout.virtual)
        if split in splits:
            continue  # the same with more recomputation, say
        refused = refusals(request, candidate) if model.architecture else []
        if refused:
            reason = reason or refused[0]
            if not found and faster is None:
                faster = candidate, refused[0]
            continue
        splits.add(split)
        found.append(candidate)
        if len(found) == _SHOWN:
            break
    if found:
        return found, faster
    assert reason is not None, "without a refusal the first candidate would have been taken"
    raise ConfigError(f"no layout that fits is allowed\n- {reason.text}")


def _nothing_fits(model: PlannedModel, request: Request, found: Search) -> ConfigError:
    cluster = request.cluster
    what = f"{model.name} on {cluster.nodes} x {cluster.gpus_per_node} {cluster.device.name}"
    if not found.tried:
        return ConfigError(
            explain(
                what,
                found="no layout divides both the model and the cluster"
                + (f" with {', '.join(sorted(request.pinned))}" if request.pinned else ""),
                rule="TP divides a node's GPUs and the model's heads, PP its layers, TP x PP x CP all GPUs",
                remedy="leave the parallel sizes to the plan, or change --nodes or --gpus-per-node",
            )
        )
    nodes = _nodes_needed(model, request)
    return ConfigError(
        explain(
            what,
            found=f"the smallest of {found.tried} layouts needs {found.smallest / GIB:.1f} GiB of a GPU",
            rule=f"{usable_bytes(cluster.device) / GIB:.1f} GiB of {cluster.device.memory_gib:g} can be used",
            remedy=f"{nodes} nodes of this kind would do (--nodes {nodes})"
            if nodes
            else "choose GPUs with more memory, a lower model.micro_batch_tokens or shorter data limits",
        )
    )


def _nodes_needed(model: PlannedModel, request: Request) -> int | None:
    while (request := twice(request)).cluster.nodes <= _MAX_NODES:
        if anything_fits(model.shape, request):
            return request.cluster.nodes
    return None


def _sampler_does_not_fit(request: Request) -> ConfigError:
    cluster = request.cluster
    return ConfigError(
        explain(
            "generation.tensor_parallel_size",
            found=f"no size up to {cluster.gpus_per_node} lets the sampler hold the weights and one answer"
            + (" with what the command line gave" if request.pinned else ""),
            rule="a replica of the sampler has the GPUs of one node at most",
            remedy="choose nodes with more or larger GPUs, or shorter data limits",
        )
    )


def _notes(plan: Plan) -> list[str]:
    request = plan.request
    found = [
        _about_batches(plan),
        _about_offloading(plan),
        _about_checkpoints(plan),
        _about_leaving(plan),
        _about_faster(plan),
    ]
    if plan.model.architecture is None:
        found.append("this model can be planned for, but not trained yet: the bridge has no table for it")
    if request.work.packing != "none" and request.work.longest_unit > plan.chosen.work.micro_batch_tokens:
        found.append(
            f"memory is for the longest unit that the data limits allow, {request.work.longest_unit} tokens; "
            "microbatches are smaller but for such units"
        )
    if request.cluster.nodes > 1 and plan.model.architecture and request.config.launcher.name == "local":
        found.append("launcher.name=local starts ranks on one node only: set the launcher of your cluster")
    return [note for note in found if note]


def _about_batches(plan: Plan) -> str | None:
    batch, layout, step = plan.request.work.global_batch_size, plan.chosen.layout, plan.chosen.step
    if layout.data > batch:
        return f"model.global_batch_size={batch} feeds {batch} of {layout.data} replicas; the others wait"
    waiting = (step.bubble + step.data) / step.total
    if waiting < _MUCH:
        return None
    return (
        f"{waiting:.0%} of a step is waiting for other stages and reducing gradients, as "
        f"{plan.chosen.work.microbatches(layout.data)} microbatches of a replica are few; a larger "
        "model.global_batch_size, or fewer nodes, use the GPUs better"
    )


def _about_offloading(plan: Plan) -> str | None:
    request, chosen = plan.request, plan.chosen
    if not request.numerics.offloaded:
        return None
    rank = offloaded_bytes(plan.model.shape, chosen.layout, chosen.work, request.numerics, stage=chosen.stage)
    return (
        f"model.optimizer_cpu_offload takes {rank * request.cluster.gpus_per_node / GIB:,.0f} GiB of a "
        "node's own memory; the CPU's share of an update, and sending it, are not in the times"
    )


def _about_checkpoints(plan: Plan) -> str | None:
    share = plan.times.checkpoints / plan.times.train
    if share < _MUCH:
        return None
    return (
        f"{share:.0%} of training is saving checkpoints, if a node writes 1 GB/s; "
        f"trainer.save_interval={plan.request.config.trainer.save_interval} could be larger"
    )


def _about_leaving(plan: Plan) -> str | None:
    request, launcher = plan.request, plan.request.config.launcher
    seconds = checkpoint_seconds(plan.model.shape, plan.chosen.layout, request.numerics, request.cluster)
    if seconds <= launcher.preemption_grace_s:
        return None
    both = "raise it, and launcher.slurm.signal_s with it" if launcher.name == "slurm" else "raise it"
    return (
        f"a checkpoint takes {seconds:,.0f} s, if a node writes 1 GB/s: a training that is told to leave is "
        f"killed after launcher.preemption_grace_s={launcher.preemption_grace_s:g} and goes on from the "
        f"checkpoint before; {both}"
    )


def _about_faster(plan: Plan) -> str | None:
    if plan.faster is None:
        return None
    candidate, mistake = plan.faster
    gain = 1 - candidate.step.total / plan.chosen.step.total
    name = mistake.keys[0].removeprefix("model.")
    if gain < 0.005:
        return None
    value = settings(candidate.layout, candidate.work).get(name)
    return f"a step would be {gain:.0%} shorter with {name}={_spelt(value)}, which is not supported yet"
