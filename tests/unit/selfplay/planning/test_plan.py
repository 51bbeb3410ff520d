"""Whole plans: what fits, what is chosen, what it says; up to 70B on 32 nodes and 235B on 128."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_spin.config.load import load_config
from nemo_spin.config.validate import check_model_fits, find_mistakes
from nemo_spin.errors import ConfigError
from nemo_spin.megatron.costs import step_time, usable_bytes
from nemo_spin.megatron.sizes import DEVICES
from nemo_spin.selfplay.planning.command import written
from nemo_spin.selfplay.planning.layouts import search
from nemo_spin.selfplay.planning.model import PlannedModel, read_model
from nemo_spin.selfplay.planning.plan import Plan, make_plan
from tests.unit.selfplay.planning import models
from tests.unit.selfplay.planning.test_request import request

ADAM = "model.optim.name=adam"


def planned(
    tmp_path: Path, config: dict[str, Any], *overrides: str, **cluster: Any
) -> tuple[PlannedModel, Plan]:
    model = read_model(str(models.write(tmp_path / "model", config)))
    return model, make_plan(model, request(*overrides, **cluster))


@pytest.mark.parametrize(
    ("config", "nodes"), [(models.LLAMA_3_8B, 1), (models.LLAMA_2_70B, 4), (models.LLAMA_2_70B, 32)]
)
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_what_is_recommended_is_valid_and_fits(
    tmp_path: Path, config: dict[str, Any], nodes: int, optimizer: str
) -> None:
    name = f"model.optim.name={optimizer}"
    model, plan = planned(tmp_path, config, name, nodes=nodes)
    assert plan.chosen.memory.total <= usable_bytes(DEVICES["H100"])
    pasted = load_config(None, [name, *plan.overrides])
    known = {"trainer.num_nodes"}  # one launcher so far, for one node
    assert {entry.keys[0] for entry in find_mistakes(pasted, command=None)} <= known
    architecture = model.architecture
    assert architecture is not None
    check_model_fits(
        pasted,
        num_layers=architecture.num_layers,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        ffn_hidden_size=architecture.ffn_hidden_size,
        vocab_size=architecture.vocab_size,
    )
    assert pasted.trainer.devices * pasted.trainer.num_nodes == 8 * nodes
    assert pasted.model.use_distributed_optimizer is plan.chosen.layout.distributed_optimizer


def test_offloading_makes_room_and_shards_even_one_replica(tmp_path: Path) -> None:
    """One GPU of 79 GiB: 18 bytes of a weight are too much for 8B of them, 6 are not."""
    alone: dict[str, Any] = {"nodes": 1, "gpus_per_node": 1}
    with pytest.raises(ConfigError):
        planned(tmp_path, models.LLAMA_3_8B, ADAM, **alone)
    offload = (ADAM, "model.optimizer_cpu_offload=true")
    _, plan = planned(tmp_path, models.LLAMA_3_8B, *offload, **alone)
    assert plan.chosen.layout.distributed_optimizer
    assert plan.chosen.memory.main_weights == plan.chosen.memory.optimizer_state == 0
    assert any("120 GiB of a node's own memory" in note for note in plan.notes), plan.notes
    assert find_mistakes(load_config(None, [*offload, *plan.overrides]), command=None) == []


def test_pasting_what_is_recommended_gives_the_same_plan(tmp_path: Path) -> None:
    _, plan = planned(tmp_path, models.LLAMA_3_8B, ADAM)
    _, again = planned(tmp_path, models.LLAMA_3_8B, ADAM, *plan.overrides)
    assert again.chosen == plan.chosen
    assert again.times == plan.times
    assert set(again.overrides) >= set(plan.overrides), "what was pinned is repeated"


def test_the_fastest_comes_first_and_no_layout_is_missed(tmp_path: Path) -> None:
    model, plan = planned(tmp_path, models.LLAMA_3_8B, ADAM)
    found = search(model.shape, plan.request)
    assert found.fitting[0].step.total == pytest.approx(
        min(candidate.step.total for candidate in found.fitting), rel=0.01
    )
    splits = {
        (entry.layout.tensor, entry.layout.pipeline, entry.layout.context, entry.layout.data)
        for entry in found.fitting
    }
    for tensor, pipeline, context, data in splits:
        assert tensor * pipeline * context * data == 8
    assert (8, 1, 1, 1) in splits and (1, 8, 1, 1) in splits and (2, 2, 1, 2) in splits
    for alternative in plan.alternatives:
        assert alternative.fits and alternative.step.total >= plan.chosen.step.total * 0.99


def test_the_configured_layout_is_shown_beside_it(tmp_path: Path) -> None:
    _, plan = planned(tmp_path, models.LLAMA_3_8B, ADAM)
    assert plan.configured is not None and plan.configured.layout.data == 8
    assert not plan.configured.fits  # one GPU cannot hold 2 + 4 bytes of 8e9 weights, and 12 / 8
    assert "as configured, does not fit: DP 8" in written(plan, as_data=False)


def test_recomputation_where_memory_is_short(tmp_path: Path) -> None:
    long = ("data.max_prompt_length=8192", "data.max_response_length=8192", "generation.max_tokens=8192")
    split = ("model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=1", ADAM)
    _, plan = planned(tmp_path, models.LLAMA_3_8B, *long, *split, "model.context_parallel_size=1")
    assert plan.chosen.layout.recompute == "full"
    never = "model.recompute_granularity=null"
    _, plan = planned(tmp_path, models.LLAMA_3_8B, *long, *split, never)
    assert plan.chosen.layout.context == 2, "a row that is shared by ranks needs less of each"


def test_uneven_stages_are_kept_as_they_are_configured(tmp_path: Path) -> None:
    first = "model.num_layers_in_first_pipeline_stage=14"
    _, plan = planned(tmp_path, models.LLAMA_3_8B, first, "model.pipeline_model_parallel_size=2", ADAM)
    assert plan.chosen.layout.layers == (14, 18)
    assert not any("pipeline_stage" in override for override in plan.overrides), "nothing to change there"
    _, free = planned(tmp_path, models.LLAMA_3_8B, first, ADAM)
    assert sum(free.chosen.layout.layers) == 32 and free.chosen.layout.layers[0] == 14


def test_nothing_fits_and_how_many_nodes_would_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"2 nodes of this kind would do \(--nodes 2\)"):
        planned(tmp_path, models.LLAMA_2_70B)
    planned(tmp_path, models.LLAMA_2_70B, nodes=2)
    tiny = replace(DEVICES["H100"], memory_gib=4.0)
    with pytest.raises(ConfigError, match="choose GPUs with more memory"):
        planned(tmp_path, models.LLAMA_2_70B, device=tiny)


def test_nothing_divides(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no layout divides .* with model\.tensor_model_parallel_size"):
        planned(tmp_path, models.LLAMA_3_8B, "model.tensor_model_parallel_size=3")


def test_what_a_run_refuses_is_not_recommended(tmp_path: Path) -> None:
    batch = ("model.packing=none", "model.micro_batch_size=1", "model.global_batch_size=2", ADAM)
    pinned = ("model.pipeline_model_parallel_size=1", "model.context_parallel_size=1")
    _, plan = planned(tmp_path, models.LLAMA_3_8B, *batch, *pinned)
    assert plan.chosen.layout.data <= 2
    with pytest.raises(ConfigError, match=r"(?s)no layout that fits is allowed.*model\.global_batch_size: 2"):
        planned(tmp_path, models.LLAMA_3_8B, *batch, *pinned, "model.tensor_model_parallel_size=2")


def test_the_sampler_must_fit_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"generation\.tensor_parallel_size"):
        planned(tmp_path, models.LLAMA_2_70B, "generation.tensor_parallel_size=1", nodes=4)
    _, plan = planned(tmp_path, models.LLAMA_2_70B, nodes=4)
    assert plan.sampling.replicas * plan.sampling.sampler.tensor == 4 * 8
    assert plan.sampling.sampler.tensor > 1


def test_replicas_that_were_asked_for(tmp_path: Path) -> None:
    _, plan = planned(tmp_path, models.LLAMA_3_8B, "generation.replicas=4")
    assert (plan.sampling.sampler.tensor, plan.sampling.replicas) == (2, 4)
    assert "generation.replicas=4" in plan.overrides


def test_twice_the_nodes(tmp_path: Path) -> None:
    _, plan = planned(tmp_path, models.LLAMA_3_8B, ADAM, "model.global_batch_size=512")
    assert plan.doubled is not None and plan.doubled.doubled is None
    assert plan.doubled.request.cluster.nodes == 2
    ratio = plan.times.train / plan.doubled.times.train
    assert 1.2 < ratio < 2.0  # more than nothing; start-up and checkpoints stay
    assert plan.doubled.times.steps == plan.times.steps


def test_times_follow_the_work(tmp_path: Path) -> None:
    settings = (ADAM, "trainer.save_interval=null")
    model, plan = planned(tmp_path, models.LLAMA_3_8B, *settings)
    more = make_plan(model, replace(plan.request, pairs=100_000))
    assert plan.times.steps == -(-1000 * 2 * 2 // 64)  # pairs, with as many earlier ones, twice, by 64
    assert more.times.steps == 100_000 * 4 // 64
    step = step_time(
        model.shape, plan.chosen.layout, plan.chosen.work, plan.request.numerics, plan.request.cluster
    ).total
    assert more.times.train - plan.times.train == pytest.approx((more.times.steps - plan.times.steps) * step)
    assert more.times.export == plan.times.export
    assert more.times.score > plan.times.score and more.times.generate > plan.times.generate


def test_a_mixture_of_experts_on_128_nodes(tmp_path: Path) -> None:
    _, plan = planned(tmp_path, models.QWEN3_235B, nodes=128)
    layout = plan.chosen.layout
    assert layout.expert > 1 and 128 % layout.expert == 0
    assert layout.tensor * layout.pipeline * layout.context * layout.data == 1024
    assert f"model.expert_model_parallel_size={layout.expert}" in plan.overrides
    assert layout.tensor == 1 or "model.sequence_parallel=true" in plan.overrides


def test_a_mixture_that_the_bridge_refuses_is_planned_without_settings(tmp_path: Path) -> None:
    _, plan = planned(tmp_path, {**models.QWEN3_235B, "mlp_only_layers": [0]}, nodes=128)
    assert plan.overrides == ()
    assert any("not trained yet" in note for note in plan.notes)


def test_more_replicas_than_a_batch_has_pairs(tmp_path: Path) -> None:
    sizes = {"tensor_model": 1, "pipeline_model": 2, "context": 1}
    pinned = [f"model.{name}_parallel_size={size}" for name, size in sizes.items()]
    _, plan = planned(tmp_path, models.LLAMA_3_8B, "model.global_batch_size=2", ADAM, *pinned)
    assert plan.chosen.layout.data == 4
    assert any("feeds 2 of 4 replicas" in note for note in plan.notes)


def test_a_grace_that_no_checkpoint_fits_into(tmp_path: Path) -> None:
    """8.03e9 weights by 2 + 4 + 4 bytes, from one node: 80 s; by two replicas' nodes 40 s each."""
    layout = ("model.tensor_model_parallel_size=4", "model.pipeline_model_parallel_size=1")
    _, plan = planned(tmp_path, models.LLAMA_3_8B, *layout)
    (note,) = [note for note in plan.notes if "preemption_grace_s=60" in note]
    assert note.startswith("a checkpoint takes 80 s") and "signal_s" not in note
    slurm = ("launcher.name=slurm", "launcher.preemption_grace_s=79", "launcher.slurm.signal_s=80")
    _, plan = planned(tmp_path, models.LLAMA_3_8B, *layout, *slurm)
    assert any("preemption_grace_s=79" in note and "signal_s" in note for note in plan.notes)
    _, plan = planned(tmp_path, models.LLAMA_3_8B, *layout, "launcher.preemption_grace_s=81")
    assert not any("preemption_grace_s" in note for note in plan.notes)
    _, plan = planned(tmp_path, models.LLAMA_3_8B, *layout, nodes=2)
    assert not any("preemption_grace_s" in note for note in plan.notes)


def test_what_an_iteration_leaves_on_the_disk(tmp_path: Path) -> None:
    """68.98e9 weights: 2 bytes each of the model, 2 + 4 + 4 of each checkpoint that stays."""
    settings = ("trainer.save_interval=10", "trainer.save_top_k=3")
    _, plan = planned(tmp_path, models.LLAMA_2_70B, *settings, nodes=4)
    assert plan.files.model == 2 * 68_976_648_192
    assert plan.files.checkpoint == 10 * 68_976_648_192
    assert plan.files.checkpoints == 3
    text = " ".join(written(plan, as_data=False).split())
    assert "An iteration leaves 2.21 TB: the model, 138 GB, and 3 checkpoints of 690 GB" in text
    assert json.loads(written(plan, as_data=True))["files"]["total"] == 32 * 68_976_648_192
    _, plan = planned(tmp_path, models.LLAMA_2_70B, "trainer.save_interval=null", nodes=4)
    assert plan.files.checkpoints == 1, "the last one"


def test_tables_and_json_say_the_same(tmp_path: Path) -> None:
    _, plan = planned(tmp_path, models.LLAMA_2_70B, nodes=32)
    text = written(plan, as_data=False)
    data = json.loads(written(plan, as_data=True))
    assert "68.98B parameters, on 32 x 8 H100" in text
    for override in plan.overrides:
        assert f"  {override}" in text
    assert data["overrides"] == list(plan.overrides)
    assert data["model"]["parameters"] == 68_976_648_192
    memory = data["layout"]["memory"]
    assert memory.pop("total") == pytest.approx(sum(memory.values()))
    assert data["twice_the_nodes"]["cluster"]["nodes"] == 64
    assert 0 < data["utilisation"] < 0.6
    for note in plan.notes:
        assert note.split()[0] in text
