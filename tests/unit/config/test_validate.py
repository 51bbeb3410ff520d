"""Every rule refuses what it must, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_spin.config.load import from_mapping
from nemo_spin.config.relations import data_parallel_size, world_size
from nemo_spin.config.rules import (
    LISTS,
    NAMES,
    OPTIONAL_PER_ITERATION,
    PER_ITERATION,
    RANGES,
    REQUIRED,
    TEXTS,
    Range,
)
from nemo_spin.config.schema import Config
from nemo_spin.config.typed import leaf_types
from nemo_spin.config.validate import check_model_fits, find_mistakes, validate
from nemo_spin.errors import ConfigError

GIVEN = ("run_dir=runs/x", "model.path=/models/m", "data.train=train.jsonl")
FREE = {  # any mapping, or one with rules of its own
    "exp_manager.wandb_logger_kwargs",
    "data.chat_template_kwargs",
    "spin.per_iteration",
    "evaluation.benchmarks.tasks",
    *(f"launcher.slurm.{name}" for name in ("time", "options", "modules", "environment", "container_mounts")),
}


def configured(*overrides: str) -> Config:
    """The schema's defaults with `overrides`, without Hydra (which `test_load.py` tests)."""
    values = OmegaConf.to_container(OmegaConf.from_dotlist([*GIVEN, *overrides]))
    assert isinstance(values, dict)
    return from_mapping(values)


def refused(*overrides: str) -> str:
    config = configured(*overrides)
    with pytest.raises(ConfigError) as caught:
        validate(config, command="run")
    return str(caught.value)


def accepted(*overrides: str) -> Config:
    config = configured(*overrides)
    validate(config, command="run")
    return config


def test_every_key_of_the_schema_has_a_rule() -> None:
    ruled = {*RANGES, *PER_ITERATION, *LISTS, *NAMES, *TEXTS, *FREE}
    leaves = leaf_types()
    unruled = {key for key, hint in leaves.items() if hint is not bool and hint != bool | None} - ruled
    assert not unruled, f"give these keys a rule in config/rules.py: {sorted(unruled)}"
    assert ruled <= set(leaves), "rules of keys that are not in the schema"
    assert {key for key, hint in leaves.items() if hint is Any} == set(PER_ITERATION)


def test_the_defaults_keep_the_rules() -> None:
    assert find_mistakes(Config(), command=None) == []
    accepted()


@pytest.mark.parametrize("command", sorted(REQUIRED))
def test_what_a_command_needs_must_be_given(command: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(Config(), command=command)
    lines = str(caught.value).splitlines()
    named = [line.removeprefix("- ").split(":")[0] for line in lines if line.endswith(": is not set")]
    assert named == list(REQUIRED[command])
    assert f"`nemo-spin {command}` needs it" in str(caught.value)


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (Range(low=1, whole=True), [1, 2, 10**12], [0, -1, 1.5, 2.0, True, "2", None, [1]]),
        (Range(above=0), [1e-300, 5, 1e300], [0, -1e-9, math.inf, math.nan, False, "1"]),
        (Range(low=0, high=1), [0, 0.5, 1], [-0.01, 1.01, math.nan]),
        (Range(low=0, below=1), [0, 0.999], [1, -1e-9]),
    ],
)
def test_ranges(allowed: Range, inside: list[Any], outside: list[Any]) -> None:
    assert all(allowed.holds(value) for value in inside)
    assert not any(allowed.holds(value) for value in outside)


def test_ranges_in_words() -> None:
    assert str(Range(low=1, whole=True)) == "a whole number of at least 1"
    assert str(Range(above=0, high=1)) == "a number above 0 and of at most 1"
    assert str(Range(low=0, high=1)) == "a number from 0 to 1"


@pytest.mark.parametrize("key", sorted(RANGES))
def test_every_single_range_is_enforced(key: str) -> None:
    message = refused(f"{key}=-1")
    assert message.replace("-1.0", "-1").startswith(f"{key}: -1\n  rule:   must be a")


@pytest.mark.parametrize("key", sorted(NAMES))
def test_every_name_is_enforced(key: str) -> None:
    is_list = leaf_types()[key] in (list[str], list[str] | None)
    message = refused(f"{key}=[nonsense]" if is_list else f"{key}=nonsense")
    assert message.startswith(f"{key}: 'nonsense'")
    assert all(name in message for name in NAMES[key])


@pytest.mark.parametrize("key", sorted(TEXTS))
def test_no_text_is_empty(key: str) -> None:
    assert f"{key}: ''\n  rule:   must not be empty" in refused(f"{key}=''")


@pytest.mark.parametrize("key", sorted(PER_ITERATION))
def test_values_per_iteration(key: str) -> None:
    good = 1
    accepted(f"{key}={good}")
    accepted(f"{key}=[{good},{good},{good}]")
    message = refused(f"{key}=[{good},{good}]")
    assert f"{key}: [1, 1] has 2 values, and there are 3 iterations" in message
    assert "remedy: give 3 values, or set spin.iterations to 2" in message
    assert f"{key}: -1 in iteration 1 of [1, -1, 1]" in refused(f"{key}=[1,-1,1]")
    assert f"{key}: 'x'" in refused(f"{key}=x")
    assert f"{key}: []" in refused(f"{key}=[]")
    assert f"{key}: True" in refused(f"{key}=true")
    for null in ("null", "[1,null,1]"):
        if key in OPTIONAL_PER_ITERATION:
            accepted(f"{key}={null}")
        else:
            assert f"{key}: None" in refused(f"{key}={null}")


def test_the_length_of_lists_is_not_judged_by_an_impossible_number_of_iterations() -> None:
    message = refused("spin.iterations=0", "spin.beta=[1,1]")
    assert "spin.iterations: 0" in message and "spin.beta" not in message


@pytest.mark.parametrize("loss", ["logistic", "hinge", "exponential", "correlation"])
def test_all_losses_are_allowed(loss: str) -> None:
    accepted(f"spin.loss={loss}")


def test_parallel_sizes_divide_the_ranks() -> None:
    message = refused(
        "trainer.devices=6", "model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"
    )
    assert "TP x PP x CP = 2 x 2 x 1 = 4 does not divide the 6 ranks" in message
    assert len(message.splitlines()) == 3  # the batch sizes are not judged as well
    config = accepted(
        "trainer.devices=8", "model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"
    )
    assert world_size(config) == 8 and data_parallel_size(config) == 2


def test_the_global_batch_is_whole_microbatches_of_every_rank() -> None:
    message = refused(
        "model.packing=none", "trainer.devices=3", "model.micro_batch_size=5", "model.global_batch_size=64"
    )
    assert "64 is not a multiple of 15 = model.micro_batch_size 5 x 3 data-parallel ranks" in message
    assert "set it to 60" in message
    accepted(
        "model.packing=none", "trainer.devices=3", "model.micro_batch_size=5", "model.global_batch_size=60"
    )
    assert "set it to 8" in refused(
        "model.packing=none", "model.micro_batch_size=8", "model.global_batch_size=3"
    )


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["model.sequence_parallel=true"],
            "model.sequence_parallel: true, with model.tensor_model_parallel_size 1",
        ),
        (
            ["model.expert_model_parallel_size=2"],
            "model.expert_model_parallel_size: 2, with 1 ranks in each of 1 pipeline stages",
        ),
        (
            ["generation.replicas=3", "trainer.accelerator=gpu", "trainer.devices=2"],
            "generation.replicas: 3 x generation.tensor_parallel_size 1, with trainer.num_nodes 1 x "
            "trainer.devices 2\n  rule:   every sampler has GPUs of its own, all on one node\n"
            "  remedy: set it to 2",
        ),
        (
            ["generation.replicas=2", "generation.engine=vllm_server", "generation.server=http://a:1"],
            "one client asks the server",
        ),
        (["trainer.num_nodes=2"], "the local launcher starts ranks on this machine only"),
        (["model.transformer_impl=transformer_engine", "trainer.accelerator=cpu"], "run on GPUs only"),
        (["model.optim.betas=[0.9]"], "model.optim.betas: [0.9]\n  rule:   two numbers"),
        (["model.optim.betas=[0.9,1]"], "model.optim.betas: 1.0 in [0.9, 1.0]"),
        (["data.prompt_template=Question"], "the text {prompt} stands exactly once"),
        (["data.prompt_template='{prompt} {prompt}'"], "has 2 places {prompt}"),
        (["data.prompt_template='### {prompt}\\n'"], "a backslash and an n where a line break is meant"),
        (
            ["generation.num_generations=2", "generation.temperature=0"],
            "every answer to a prompt is the same",
        ),
        (
            ["generation.num_generations=2", "generation.temperature=[1,0,1]"],
            "every answer to a prompt is the same",
        ),
        (["generation.stop_token_ids=[1,-2]"], "generation.stop_token_ids: -2 in [1, -2]"),
        (["name=a/b"], "name: 'a/b'"),
        (["name=.."], "name: '..'"),
        (["evaluation.scorer=score", "data.heldout=h"], "`package.module:function`"),
        (["evaluation.scorer=a.b:score"], "given, but data.heldout is null"),
        (["sft.output=runs/x"], "sft.output: 'runs/x' is run_dir too"),
        (["exp_manager.create_wandb_logger=true"], "needs the key `project`"),
        (["data.overlong_prompt=truncate"], "did you mean `truncate_left`?"),
    ],
)
def test_rules_about_several_keys_or_the_form_of_one(overrides: list[str], expected: str) -> None:
    message = refused(*overrides)
    assert expected in message
    assert len(message.splitlines()) == 3, message


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.sequence_parallel=true", "model.tensor_model_parallel_size=2", "trainer.devices=2"],
        ["generation.temperature=0"],
        ["data.prompt_template='{prompt}'"],
        ["evaluation.scorer=examples/a b.py:score", "data.heldout=h"],
        ["evaluation.scorer=a.b:score", "evaluation.enabled=false"],
        ["exp_manager.create_wandb_logger=true", "exp_manager.wandb_logger_kwargs.project=p"],
        ["model.recompute_granularity=full"],
        ["spin.gates.ln2_tolerance=null", "spin.gates.sampler=false"],
    ],
)
def test_what_the_rules_allow(overrides: list[str]) -> None:
    accepted(*overrides)


def test_all_broken_rules_come_together() -> None:
    message = refused("seed=-1", "spin.loss=hing", "spin.beta=[1]", "trainer.num_nodes=2", "name=a/b")
    assert message.startswith("5 mistakes in the configuration\n")


SIZES = {
    "num_layers": 6,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "ffn_hidden_size": 96,
    "vocab_size": 1001,
}


def unfit(*overrides: str, **sizes: int) -> str:
    config = configured(*overrides)
    with pytest.raises(ConfigError) as caught:
        check_model_fits(config, **(SIZES | sizes))
    return str(caught.value)


def test_a_model_that_fits() -> None:
    config = accepted(
        "trainer.devices=12",
        "model.tensor_model_parallel_size=4",
        "model.pipeline_model_parallel_size=3",
        "model.micro_batch_size=1",
        "generation.tensor_parallel_size=8",
    )
    check_model_fits(config, **SIZES)


def test_a_model_that_cannot_be_split() -> None:
    message = unfit("model.tensor_model_parallel_size=8", "model.pipeline_model_parallel_size=4")
    assert "model.tensor_model_parallel_size: 8 does not divide the model's 4 key/value heads" in message
    assert "attention heads" not in message
    assert "model.pipeline_model_parallel_size: 4 does not divide the model's 6 layers" in message
    assert "remedy: set it to one of 1, 2, 3, 6" in message
    assert "3 does not divide the model's 8 attention heads" in unfit("model.tensor_model_parallel_size=3")
    assert "4 does not divide the model's 90 MLP columns" in unfit(
        "model.tensor_model_parallel_size=4", ffn_hidden_size=90
    )
    assert "a vocabulary of 3" in unfit("model.tensor_model_parallel_size=4", vocab_size=3)


def test_a_sampler_that_cannot_be_split() -> None:
    assert "generation.tensor_parallel_size: 3 does not divide" in unfit("generation.tensor_parallel_size=3")
    message = unfit("generation.tensor_parallel_size=4", num_attention_heads=12, num_query_groups=6)
    assert "4 neither divides the model's 6 key/value heads nor is a multiple of them" in message


def test_an_interleaved_schedule_needs_two_stages() -> None:
    message = refused("model.virtual_pipeline_model_parallel_size=2")
    assert "through several stages" in message and "set it to null" in message
    two = ("trainer.devices=2", "model.pipeline_model_parallel_size=2")
    accepted(*two, "model.virtual_pipeline_model_parallel_size=2")


def test_both_optimizers_are_shared_out() -> None:
    for name in ("rmsprop", "adam"):
        accepted("model.use_distributed_optimizer=true", f"model.optim.name={name}")


def test_offloading_is_for_a_sharded_adam_on_gpus() -> None:
    on = "model.optimizer_cpu_offload=true"
    accepted(on, "model.optim.name=adam", "model.optimizer_offload_fraction=0.5")
    message = refused(
        on,
        "model.optim.name=rmsprop",
        "model.use_distributed_optimizer=false",
        "trainer.accelerator=cpu",
        "trainer.precision=32",
    )
    for reason in ("offloads Adam alone", "distributed optimizer alone", "on the CPU already", "bf16"):
        assert reason in message
    assert "model.optimizer_offload_fraction" in refused("model.optimizer_offload_fraction=0")
