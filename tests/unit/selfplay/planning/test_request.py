"""What a command line and a configuration ask for."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_spin.config.load import load_config
from nemo_spin.errors import ConfigError
from nemo_spin.megatron.sizes import DEVICES, Cluster
from nemo_spin.selfplay.planning.request import Lengths, Request, count, make_request, read_device


def request(*overrides: str, lengths: Lengths | None = None, **cluster: Any) -> Request:
    return make_request(
        load_config(None, overrides),
        overrides,
        cluster=Cluster(
            **{"nodes": 1, "gpus_per_node": 8, "device": DEVICES["H100"], **cluster},
        ),
        pairs=1000,
        lengths=lengths or Lengths(),
    )


def test_lengths_come_from_the_limits_unless_they_are_given() -> None:
    limits = ("data.max_prompt_length=400", "data.max_response_length=800", "generation.max_tokens=600")
    work = request(*limits).work
    assert (work.prompt, work.real, work.generated) == (100, 200, 300)
    assert work.longest_unit == 400 + 800 + 600
    assert request(*limits, "generation.num_generations=4").work.longest_unit == 400 + 800 + 4 * 600
    pairs = request(*limits, "generation.num_generations=4", "model.packing=pairs")
    assert pairs.work.longest_unit == 5 * 400 + 800 + 4 * 600
    given = request(*limits, lengths=Lengths(50, 60, 70)).work
    assert (given.prompt, given.real, given.generated) == (50, 60, 70)


def test_precision_and_optimizer() -> None:
    assert request().numerics.bytes_per_number == 2
    numerics = request("trainer.precision=32", "model.optim.name=adam")
    assert numerics.numerics.bytes_per_number == 4
    assert numerics.numerics.optimizer == "adam"


def test_the_longest_iteration_counts() -> None:
    assert request("spin.epochs=[1,3,2]").epochs == 3


def test_keys_of_the_command_line_are_pinned() -> None:
    asked = request("model.tensor_model_parallel_size=4", "+model.sequence_parallel=true")
    assert asked.pinned == {"model.tensor_model_parallel_size", "model.sequence_parallel"}


def test_parallel_sizes_are_not_judged_here() -> None:
    request("model.tensor_model_parallel_size=8", "trainer.num_nodes=4", "generation.replicas=4")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.micro_batch_tokens=0"], "model.micro_batch_tokens"),
        (["model.tensor_model_parallel_size=0"], "model.tensor_model_parallel_size"),
        (["spin.epochs=[1,2]"], "spin.epochs"),
        (["model.packing=tight"], "model.packing"),
    ],
)
def test_mistakes_of_the_configuration(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        request(*overrides)


@pytest.mark.parametrize("tokens", [0.0, -1.0, 1025.0, float("nan"), float("inf")])
def test_a_mean_above_its_limit(tokens: float) -> None:
    with pytest.raises(ConfigError, match="--real-tokens"):
        request(lengths=Lengths(real=tokens))


@pytest.mark.parametrize("value", [0, -3, 11])
def test_counts(value: int) -> None:
    assert count("--nodes", 10, most=10) == 10
    with pytest.raises(ConfigError, match="--nodes"):
        count("--nodes", value, most=10)


def test_gpus_by_kind_and_by_numbers() -> None:
    assert read_device("h100") == DEVICES["H100"]
    larger = read_device("H100, memory_gib=94")
    assert larger.memory_gib == 94 and larger.tflops == 989
    own = read_device("memory_gib=24,tflops=71,memory_gb_s=1000,link_gb_s=16,network_gb_s=1.25")
    assert (own.name, own.network_gb_s) == ("given", 1.25)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("H10", "did you mean H100"),
        ("", "not in the table"),
        ("memory_gib=24", "has no tflops"),
        ("H100,memory_gib=lots", "not a positive number"),
        ("H100,memory_gib=-1", "not a positive number"),
        ("H100,memory_gib=nan", "not a positive number"),
        ("H100,speed=3", "no property"),
        ("H100,H200", "no property"),
    ],
)
def test_gpus_that_are_not_known(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_device(text)


@pytest.mark.parametrize("name", DEVICES)
def test_the_table_holds_rates_that_are_possible(name: str) -> None:
    device = DEVICES[name]
    assert device.name == name
    assert device.network_gb_s <= device.link_gb_s < device.memory_gb_s
    assert 30 < device.memory_gib < 200 and 300 < device.tflops < 3000
